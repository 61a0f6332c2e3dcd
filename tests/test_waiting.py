"""A long wait says how far it is."""

import io

from rich.console import Console

from lossmith.report.run.waiting import minutes, waiting


def test_a_pipe_gets_a_line_a_minute_with_what_is_left():
    out, now = io.StringIO(), [0.0]
    with waiting(Console(file=out, width=80), "sampling 8 x 6 completions", clock=lambda: now[0]) as count:
        for done in range(1, 49):
            now[0] += 10.0
            count(done, 48)
    assert out.getvalue().splitlines() == [
        f"sampling 8 x 6 completions: {k} of 48, about {minutes(10.0 * (48 - k))} left" for k in range(6, 48, 6)
    ]
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_a_short_wait_says_nothing_in_a_pipe():
    out = io.StringIO()
    with waiting(Console(file=out), "sampling") as count:
        count(1, 2)
        count(2, 2)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_count_that_is_gone_afterwards():
    out = io.StringIO()
    with waiting(Console(file=out, force_terminal=True, width=80), "judging") as count:
        count(3, 12)
    assert "3/12" in out.getvalue()


def test_minutes():
    assert [minutes(s) for s in (0, 59.9, 61, 3600, 36061)] == ["0:00", "0:59", "1:01", "1:00:00", "10:01:01"]

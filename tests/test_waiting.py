"""A long wait says how far it is."""

import io

from rich.console import Console

from lossmith.report.run import waiting
from lossmith.report.run.waiting import minutes


def test_what_is_counted_says_how_long_it_will_take(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    busy = waiting.Busy(Console(file=io.StringIO(), width=80), "sampling 8 x 6 completions")
    for done in range(1, 49):
        now[0] += 10.0
        busy.count(done, 48)
        spent, left = minutes(10.0 * done), minutes(10.0 * (48 - done))
        assert busy.line() == f"sampling 8 x 6 completions {done}/48, for {spent}, about {left} left"
        assert len(busy.line()) <= 80
    busy.about("judging")  # another stage begins anew
    assert busy.line() == "judging, for 0:00"


def test_a_short_wait_says_nothing_in_a_pipe():
    out = io.StringIO()
    with waiting.Busy(Console(file=out), "sampling") as busy:
        busy.count(1, 2)
        busy.count(2, 2)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_count_that_is_gone_afterwards():
    out = io.StringIO()
    with waiting.Busy(Console(file=out, force_terminal=True, width=80), "judging") as busy:
        busy.count(3, 12)
    assert "3/12" in out.getvalue()


def test_minutes():
    assert [minutes(s) for s in (0, 59.9, 61, 3600, 36061)] == ["0:00", "0:59", "1:01", "1:00:00", "10:01:01"]

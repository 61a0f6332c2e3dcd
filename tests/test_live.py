"""What a run shows while it goes on: lines of 80 columns, a count while it waits, on a terminal and in a pipe."""

import io
import re
import time

import pytest
from rich.console import Console

import lossmith as ls
import tiny
from lossmith.api import run_recipe
from lossmith.report.run import live
from lossmith.report.run.live import WIDTH, LiveView, step_line
from lossmith.report.run.waiting import Busy
from lossmith.training import Recipe
from lossmith.training.evaluate import Evaluation

PROMPTS = [f"Prompt number {i}?" for i in range(16)]


def recipe(tmp_path, **changes):
    fixed = dict(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=PROMPTS, held_out=4, steps=2,
        prompts_per_step=2, samples_per_prompt=3, max_tokens=6, runs=str(tmp_path / "runs"), learning_rate=3e-3,
        scorer=lambda completions, **_: [float(len(set(c))) for c in completions], loss="grpo", save_rollouts=False,
    )  # fmt: skip
    return Recipe.make(**fixed | changes)


def shown(tmp_path, *, terminal=False, width=80, **changes):
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=width)
    run = run_recipe(recipe(tmp_path, **changes), console=console)
    return run, console.file.getvalue()


class Fake:
    """Enough of a run and of its steps for the view."""

    def __init__(self, steps, first=0):
        self.recipe, self.first_step = Recipe.make(steps=steps), first


class FakeStep:
    def __init__(self, index, **record):
        self.index, self.findings = index, []
        self.record = {
            "reward": 0.895, "watch": 0.512, "kl": 12.345, "sampled_entropy": 0.81, "length": 32.7, "ended": 0.8,
            "dropped": 0, "skipped_updates": 0, "advantage_abs": 0.7, "loss": 1.0,
        } | record  # fmt: skip


def lines_of(step, steps=12, width=80, terminal=False):
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=width)
    with LiveView(Fake(steps), console) as view:
        view.begin()
        view.show(step)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


# -- lines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize(
    ("step", "steps"),
    [
        (FakeStep(11), 12),
        (FakeStep(99_998, reward=-123.456, watch=-99.5, kl=1234.5, length=16384.0), 100_000),
        (FakeStep(3, reward=-1e30, watch=3e38, kl=1e12, length=99999.9), 12),
        (FakeStep(0, dropped=48, skipped_updates=2, advantage_abs=0.0), 12),
    ],
)
def test_every_line_of_a_step_fits_80_columns_and_says_the_unit_of_the_kl(step, steps, width):
    lines = [line for line in lines_of(step, steps, width) if line]
    assert all(len(line) <= WIDTH for line in lines) and "nats" in lines[0]
    assert lines[0].startswith(f"step {step.index + 1:>3}/{steps}  reward") and " left " in lines[0]


def test_a_usual_line():
    (line,) = lines_of(FakeStep(11))
    assert line == "step  12/12  reward 0.895  watched 0.512  KL 12.35 nats  entropy 0.81  left 0:00"
    step = FakeStep(11)
    del step.record["kl"], step.record["watch"]
    assert lines_of(step) == ["step  12/12  reward 0.895  entropy 0.81  ended 80%  length 32.7  left 0:00"]


def test_figures_are_left_out_whole_and_the_first_first():
    figures = [(f"figure{i}", "1.000") for i in range(9)]
    line = step_line(3, 12, figures, "left 0:01")
    assert line.endswith("figure4 1.000  left 0:01") or len(line) <= WIDTH
    assert re.findall(r"figure(\d) 1.000", line) == [str(i) for i in range(line.count("figure"))]


def test_what_went_wrong_in_a_step_stands_below_it():
    lines = lines_of(FakeStep(0, dropped=3, advantage_abs=0.0))
    assert lines[1].startswith("  ! 3 completions without a score were dropped; no learning signal")
    assert lines_of(FakeStep(0, groups=2.0, constant_groups=2.0))[1:] == []  # a loss that compares nothing learns


@pytest.mark.parametrize("terminal", [True, False])
def test_the_lines_of_a_whole_run_fit(tmp_path, terminal):
    _, text = shown(tmp_path, terminal=terminal, loss="grpo(beta=0.1)", watch="length")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    steps = [line for line in plain.replace("\r", "\n").splitlines() if re.match(r"step +\d+/2  reward", line)]
    assert len(steps) == 2 and all(len(line.rstrip()) <= WIDTH for line in steps)
    (first,) = [line for line in steps if line.startswith("step   1/2")]
    assert "KL 0.00 nats" in first and "watched" in first
    assert "KL: nats a completion" in plain


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_in_a_pipe_a_long_wait_gets_a_line_now_and_then_and_a_short_one_none():
    console = Console(file=io.StringIO(), width=80)
    with Busy(console, every=0.05) as busy:
        busy.about("held-out prompts before training")
        busy("sampling", 12, 48)
        time.sleep(0.2)
        busy("scoring")
        time.sleep(0.2)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "held-out prompts before training: sampling 12/48, for 0:00"
    assert lines[-1] == "held-out prompts before training: scoring, for 0:00" and 3 <= len(lines) <= 9
    quick = Console(file=io.StringIO(), width=80)
    with Busy(quick, every=30) as busy:
        busy.about("step 1/3")
        busy("sampling", 1, 48)
    assert quick.file.getvalue() == ""


def test_what_is_printed_meanwhile_puts_the_next_line_off():
    console = Console(file=io.StringIO(), width=80)
    with Busy(console, every=0.2) as busy:
        busy.about("step 1/3")
        for _ in range(8):
            time.sleep(0.05)
            busy.told()
    assert console.file.getvalue() == ""


def test_nothing_is_said_to_a_quiet_console():
    console = Console(file=io.StringIO(), quiet=True)
    with Busy(console, every=0.01) as busy:
        busy.about("step 1/3")
        time.sleep(0.05)
    assert console.file.getvalue() == ""


def test_on_a_terminal_the_count_is_live_and_leaves_nothing_behind():
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80, legacy_windows=False)
    with Busy(console) as busy:
        busy.about("held-out prompts before training")
        for done in range(5):
            busy("sampling", done, 4)
            time.sleep(0.12)
    text = console.file.getvalue()
    assert "held-out prompts before training: sampling" in text and "4/4" in text and "2/4" in text
    assert text.endswith("\x1b[2K") or "\x1b[1A\x1b[2K" in text  # erased


def test_a_run_says_what_it_samples_and_scores_and_how_far_it_is(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        live.Busy, "__call__", lambda self, what, done=0, total=0: said.append((self._stage, what, done, total))
    )
    run, _ = shown(tmp_path, steps=2)
    stages = list(dict.fromkeys(stage for stage, *_ in said))
    assert stages == ["held-out prompts before training", "step 1/2", "step 2/2", "held-out prompts after training"]
    for stage, total in zip(stages, (4, 6, 6, 4), strict=True):
        mine = [entry[1:] for entry in said if entry[0] == stage]
        sampled = [done for what, done, of in mine if what == "sampling" and of == total]
        assert sampled == sorted(sampled) and sampled[-1] == total
        assert ("scoring", 0, total) in mine
    assert isinstance(run.after, Evaluation)


def test_a_heartbeat_comes_while_a_scorer_takes_long(tmp_path, monkeypatch):
    monkeypatch.setattr(live.Busy.__init__, "__defaults__", ("", 0.05))

    def slow(completions, **_):
        time.sleep(0.4)
        return [float(len(set(c))) for c in completions]

    _, text = shown(tmp_path, steps=1, scorer=slow)
    assert re.search(r"held-out prompts before training: scoring 0/4, for 0:0\d", text)
    assert re.search(r"step 1/1: scoring 0/6, for 0:0\d", text)


# -- steps are told from 1 --------------------------------------------------------------------------------------------


def test_errors_count_steps_as_progress_does(tmp_path):
    calls = []

    def then_fails(completions, **_):
        calls.append(1)
        return [None] * len(completions) if len(calls) == 3 else [float(len(set(c))) for c in completions]

    with pytest.raises(ls.errors.RunError, match=r"^step 2: none of 6 completions has a score"):
        run_recipe(recipe(tmp_path, steps=3, scorer=then_fails, scorer_errors="drop"), console=Console(quiet=True))

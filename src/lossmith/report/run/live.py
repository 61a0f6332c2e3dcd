"""What people see of a run: a line a step that fits 80 columns, and between them how far the present wait is."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console

from lossmith.detectors.ratios import GAP_NOTE
from lossmith.detectors.signal import without_signal
from lossmith.detectors.words import line
from lossmith.report.run.waiting import Busy, minutes
from lossmith.training import Run, Step
from lossmith.training.guards import kl_of_completion

__all__ = ["WIDTH", "LiveView", "step_line"]

WIDTH = 80  # columns, on a terminal and in a pipe
_FIGURES: tuple[tuple[str, Callable[[Mapping[str, Any]], str | None]], ...] = (
    ("reward", lambda r: _number(r["reward"])),
    ("watched", lambda r: _number(r["watch"]) if "watch" in r else None),
    ("KL", lambda r: None if (kl := kl_of_completion(r)) is None else f"{kl:.2f} nats"),
    ("entropy", lambda r: f"{max(r['sampled_entropy'], 0.0):.2f}"),  # an estimate of 0 may be a rounding below it
    ("gap", lambda r: f"{gap:.3f}" if (gap := r.get("sampler_gap", 0.0)) >= GAP_NOTE else None),
    ("ESS", lambda r: f"{r['ess']:.0%}" if "push_tokens" in r and "ess" in r else None),
    ("ended", lambda r: f"{r['ended']:.0%}"),
    ("length", lambda r: f"{r['length']:.1f}"),
)


class LiveView:
    """`with LiveView(run, console) as view: run.start(); for step in learn(run): view.show(step)`."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console, self.busy = run, console, Busy(console)

    def __enter__(self) -> LiveView:
        self.busy.__enter__()
        self.run.tell = self.busy
        self.busy.about("held-out prompts before training")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.busy.__exit__(kind, error, trace)

    def begin(self) -> None:
        """The steps begin."""
        self._started = time.perf_counter()
        self.busy.about(f"step {self.run.first_step + 1}/{self.run.recipe.steps}")

    def show(self, step: Step) -> None:
        """One line a step, and below it what was wrong with it."""
        done, steps = step.index + 1, self.run.recipe.steps
        elapsed = time.perf_counter() - self._started
        remaining = elapsed / (done - self.run.first_step) * (steps - done)
        figures = [(name, text) for name, of in _FIGURES if (text := of(step.record)) is not None]
        lines = [step_line(done, steps, figures, f"left {minutes(remaining)}"), *_warnings(step.record)]
        lines += [text for finding in step.findings for text in line(finding)]
        self.console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
        self.busy.told()
        self.busy.about(f"step {done + 1}/{steps}" if done < steps else "held-out prompts after training")

    def end(self) -> None:
        """The steps are over, early or not."""
        self.busy.about("held-out prompts after training")


def step_line(done: int, steps: int, figures: Sequence[tuple[str, str]], last: str = "") -> str:
    """`step   3/12  reward 0.512  ...  left 0:40`: as many figures, in their order, as fit; metrics.jsonl has all."""
    line, tail = f"step {done:>3}/{steps}", f"  {last}" if last else ""
    for name, text in figures:
        longer = f"{line}  {name} {text}"
        if len(longer + tail) > WIDTH:
            break
        line = longer
    return line + tail


def _number(x: float) -> str:
    return f"{x:.3f}" if abs(x) < 1e5 else f"{x:.3g}"


def _warnings(record: Mapping[str, Any]) -> list[str]:
    notes = []
    if record.get("dropped"):
        notes.append(f"{record['dropped']} completions without a score were dropped")
    if record.get("skipped_updates"):
        notes.append("update skipped: gradient not finite")
    if without_signal(record):
        notes.append("no learning signal: the rewards of each prompt's completions are all equal")
    return textwrap.wrap("; ".join(notes), WIDTH, initial_indent="  ! ", subsequent_indent="    ")

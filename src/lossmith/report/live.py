"""What a run shows while it goes on: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lossmith.training import Run, Step

__all__ = ["LiveView"]

_COLUMNS = (
    ("reward", "reward", "{:.3f}"),
    ("watch", "watched", "{:.3f}"),
    ("kl_ref", "KL", "{:.4f}"),
    ("sampled_entropy", "entropy", "{:.2f}"),
    ("length", "length", "{:.1f}"),
    ("ended", "ended", "{:.0%}"),
    ("loss", "loss", "{:+.4f}"),
    ("grad_norm", "grad", "{:.2f}"),
    ("tokens_per_second", "tok/s", "{:.0f}"),
)


class LiveView:
    """`with LiveView(run) as view: for step in learn(run): view.show(step)`."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console = run, console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> LiveView:
        self._progress.start()
        total = self.run.recipe.steps
        self._task = self._progress.add_task("step", total=total, completed=self.run.first_step, figures="")
        self._started = time.perf_counter()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, step: Step) -> None:
        """One line a step; on a terminal with the bar and the time left below it."""
        record = step.record
        figures = "  ".join(f"{name} {form.format(record[key])}" for key, name, form in _COLUMNS if key in record)
        done, left = step.index + 1, self.run.recipe.steps - step.index - 1
        elapsed = time.perf_counter() - self._started
        remaining = elapsed / (done - self.run.first_step) * left
        self.console.print(
            f"step {done:>3}/{self.run.recipe.steps}  {figures}  left {_minutes(remaining)}{_warnings(record)}",
            highlight=False,
            soft_wrap=True,
        )
        self._progress.update(self._task, completed=done, figures=f"reward {record['reward']:.3f}")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _warnings(record: dict) -> str:
    notes = []
    if record.get("dropped"):
        notes.append(f"{record['dropped']} without a score dropped")
    if record.get("skipped_updates"):
        notes.append("update skipped: gradient not finite")
    constant = record.get("groups") and record.get("constant_groups", 0) == record["groups"]
    if constant and record.get("advantage_abs", 0) == 0:  # a loss that compares nothing learns from them
        notes.append("no learning signal: every group's rewards are equal")
    return "  ! " + "; ".join(notes) if notes else ""

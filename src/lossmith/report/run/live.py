"""What people see while something takes long: step lines that fit 80 columns, and how far the present wait is."""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lossmith.training import Run, Step
from lossmith.training.guards import kl_of_completion
from lossmith.training.metrics import without_signal

__all__ = ["WIDTH", "Busy", "LiveView", "step_line"]

WIDTH = 80  # columns, on a terminal and in a pipe
MINUTE = 60.0
_FIGURES: tuple[tuple[str, Callable[[Mapping[str, Any]], str | None]], ...] = (
    ("reward", lambda r: _number(r["reward"])),
    ("watched", lambda r: _number(r["watch"]) if "watch" in r else None),
    ("KL", lambda r: None if (kl := kl_of_completion(r)) is None else f"{kl:.2f} nats"),
    ("entropy", lambda r: f"{max(r['sampled_entropy'], 0.0):.2f}"),  # an estimate of 0 may be a rounding below it
    ("ended", lambda r: f"{r['ended']:.0%}"),
    ("length", lambda r: f"{r['length']:.1f}"),
)


class Busy:
    """`with Busy(console) as busy: busy.about("step 3/12"); busy("sampling", 12, 64)`.

    On a terminal a live count; elsewhere a line a minute, for as long as nothing else is said (`told`).
    """

    def __init__(self, console: Console, every: float = MINUTE) -> None:
        self.console, self.every = console, every
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, count="")
        self._stage = self._what = self._count = ""
        self._began = self._told = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="lossmith-busy", daemon=True)

    def __enter__(self) -> Busy:
        if self.console.is_terminal:
            self._bar.start()
        elif not self.console.quiet:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._bar.stop()
        if self._thread.is_alive():
            self._thread.join()

    def about(self, stage: str) -> None:
        """What is being done from now on; its time begins."""
        self._stage, self._what, self._count = stage, "", ""
        self._began = time.monotonic()
        self._bar.reset(self._task, description=stage, total=None, count="")

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        """How far it is."""
        self._what, self._count = what, f"{done}/{total}" if total else ""
        described = f"{self._stage}: {what}"
        self._bar.update(self._task, description=described, completed=done, total=total or None, count=self._count)

    def told(self) -> None:
        """Something was printed: the next line is due a minute from now."""
        self._told = time.monotonic()

    def _tell(self) -> None:
        while not self._over.wait(min(1.0, self.every / 4)):
            now = time.monotonic()
            if self._stage and now - self._told >= self.every:
                doing = ": ".join(filter(None, (self._stage, f"{self._what} {self._count}".strip())))
                self.console.print(
                    f"{doing}, for {_minutes(now - self._began)}", highlight=False, soft_wrap=True, markup=False
                )
                self.told()


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
        lines = [step_line(done, steps, figures, f"left {_minutes(remaining)}"), *_warnings(step.record)]
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


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _warnings(record: Mapping[str, Any]) -> list[str]:
    notes = []
    if record.get("dropped"):
        notes.append(f"{record['dropped']} completions without a score were dropped")
    if record.get("skipped_updates"):
        notes.append("update skipped: gradient not finite")
    if without_signal(record):
        notes.append("no learning signal: the rewards of each prompt's completions are all equal")
    return textwrap.wrap("; ".join(notes), WIDTH, initial_indent="  ! ", subsequent_indent="    ")

"""A long wait shows how far it is: a live count on a terminal, a line a minute in a file or pipe."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Busy", "minutes"]

MINUTE = 60.0


class Busy:
    """`with Busy(console, "step 3/12") as busy: busy("sampling", 12, 64)`; `busy.count(12, 64)` for the stage itself.

    On a terminal a live count that is gone afterwards; elsewhere a line a minute, for as long as nothing else is said
    (`told`). A line is at most 80 columns if stage and what have at most 40.
    """

    def __init__(self, console: Console, stage: str = "", every: float = MINUTE) -> None:
        self.console, self.every = console, every
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(), console=console, transient=True, disable=not self._live,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, count="")
        self._what = self._count = ""
        self._left: float | None = None  # seconds, where the stage itself is counted
        self._told = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="lossmith-busy", daemon=True)
        self.about(stage)

    def __enter__(self) -> Busy:
        if self._live:
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
        self._left = None
        self._began = time.monotonic()
        self._bar.reset(self._task, description=stage, total=None, count="")

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        """How far it is."""
        self._what, self._count = what, f"{done}/{total}" if total else ""
        described = ": ".join(filter(None, (self._stage, what)))
        self._bar.update(self._task, description=described, completed=done, total=total or None, count=self._count)

    def told(self) -> None:
        """Something was printed: the next line is due a minute from now."""
        self._told = time.monotonic()

    def count(self, done: int, total: int) -> None:
        """How far the stage itself is, and so how long it will take."""
        self("", done, total)
        self._left = (time.monotonic() - self._began) * (total - done) / done if done else None

    def line(self) -> str:
        """What is being done, in a line."""
        counted = f"{self._what} {self._count}".strip()
        doing = f"{self._stage}: {counted}" if self._what else f"{self._stage} {counted}".strip()
        left = "" if self._left is None else f", about {minutes(self._left)} left"
        return f"{doing}, for {minutes(time.monotonic() - self._began)}{left}"

    def _tell(self) -> None:
        while not self._over.wait(min(1.0, self.every / 4)):
            if self._stage and time.monotonic() - self._told >= self.every:
                self.console.print(self.line(), highlight=False, soft_wrap=True, markup=False)
                self.told()


def minutes(seconds: float) -> str:
    """m:ss, or h:mm:ss."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"

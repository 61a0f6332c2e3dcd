"""A long wait shows how far it is: a live count on a terminal, a line a minute in a file or pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["minutes", "waiting"]

EVERY = 60.0  # seconds between lines where nothing can be drawn over


@contextmanager
def waiting(
    console: Console, what: str, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int, int], None]]:
    """`with waiting(console, "sampling") as count: count(3, 48)`: 3 of 48 are done. Nothing of it stays on a terminal.

    A line is at most 80 columns if `what` has at most 40.
    """
    start = said = clock()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def count(done: int, of: int) -> None:
            nonlocal said
            progress.update(task, completed=done, total=of)
            now = clock()
            if not console.is_terminal and now - said >= EVERY and 0 < done < of:
                left = (now - start) * (of - done) / done
                console.print(f"{what}: {done} of {of}, about {minutes(left)} left", highlight=False, markup=False)
                said = now

        yield count


def minutes(seconds: float) -> str:
    """m:ss, or h:mm:ss."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"

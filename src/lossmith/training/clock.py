"""Wall-clock seconds by part of a step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

__all__ = ["Clock"]


class Clock:
    """`with clock("forward"): ...` adds to that part's seconds; `read` gives them all and starts again."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    def add(self, seconds: Mapping[str, float]) -> None:
        """What was measured elsewhere."""
        for part, more in seconds.items():
            self._seconds[part] = self._seconds.get(part, 0.0) + more

    def read(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, {}
        return seconds

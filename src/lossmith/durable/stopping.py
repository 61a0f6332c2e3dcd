"""Signals that end a piece of work without losing it.

The first Ctrl-C, SIGTERM or SIGHUP lets the unit of work under way finish, for GRACE seconds; then it is dropped. Where
work is in a state that cannot be kept, it is waited for as long as that takes. A second one ends the work at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import types
from collections.abc import Callable
from typing import Any

__all__ = ["GRACE", "Stopping"]

GRACE = 3.0  # seconds; a supervisor that sends SIGTERM kills ten or more seconds later
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopping:
    """`with Stopping() as stop:` around the work, and `stop.check()` after each unit of it.

    busy: whether what is in memory is half done, so that nothing may be interrupted now; None while there is nothing
    to keep yet, and the first signal ends the work at once. What is raised is KeyboardInterrupt for Ctrl-C, and
    SystemExit(128 + signal) for the others, out of `check` or out of whatever is under way. Python gives signals to
    the main thread alone: in another one nothing is installed.
    """

    def __init__(self, busy: Callable[[], bool] | None = None) -> None:
        self.busy = busy
        self.asked: int | None = None  # the signal that came
        self.at_once = False  # it came twice
        self._overdue = False
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._main = threading.get_ident()
            for number in _SIGNALS:
                # nohup means to go on. Ctrl-C is ignored in every background job of a script: kill -INT is meant.
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._timer is not None:
            self._timer.cancel()

    def check(self) -> None:
        """Between two units of work: end here if it was asked for."""
        if self.asked is not None and not (self.busy and self.busy()):
            self._end()

    def _came(self, number: int, frame: types.FrameType | None) -> None:
        if self._overdue:  # the timer's
            self._overdue = False
            return self._again_later() if self.busy and self.busy() else self._end()
        self.at_once = self.asked is not None
        self.asked = number
        if self.at_once or self.busy is None:
            self._end()
        with contextlib.suppress(OSError):  # print would meet itself here, and the terminal may be gone
            os.write(2, b"\nstopping: finishing what takes seconds, and saving; once more leaves at once\n")
        self._again_later()

    def _again_later(self) -> None:
        self._timer = threading.Timer(GRACE, self._remind)
        self._timer.daemon = True
        self._timer.start()

    def _remind(self) -> None:
        """Interrupt the main thread, wherever it waits."""
        self._overdue = True
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(self._main, self.asked or signal.SIGINT)
        else:
            signal.raise_signal(self.asked or signal.SIGINT)

    def _end(self) -> None:
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + int(self.asked or 0))

"""Signals that end a piece of work without losing it.

The first Ctrl-C, SIGTERM or SIGHUP lets the unit of work under way finish, for GRACE seconds; then it is dropped. Where
work is in a state that cannot be kept, it is waited for as long as that takes. A second one ends the work at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import types
from collections.abc import Callable
from typing import Any

__all__ = ["GRACE", "Stopped", "Stopping"]

GRACE = 3.0  # seconds; a supervisor that sends SIGTERM kills ten or more seconds later
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal ended the work. Whatever lets Ctrl-C through lets the others through as well."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Stopping:
    """`with Stopping() as stop:` around the work, and `stop.check()` after each unit of it.

    busy: whether what is in memory is half done, so that nothing may be interrupted now; None while there is nothing
    to keep yet, and the first signal ends the work at once. Stopped is raised out of `check`, or out of whatever is
    under way; out of the `with` come KeyboardInterrupt for Ctrl-C, and SystemExit(128 + signal) for the others. Python
    gives signals to the main thread alone: in another one nothing is installed.
    """

    def __init__(self, busy: Callable[[], bool] | None = None) -> None:
        self.busy = busy
        self.signal_number: int | None = None  # the signal that came
        self.at_once = False  # it came twice
        self._overdue = False
        self._heard = threading.Event()
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # nohup means to go on. Ctrl-C is ignored in every background job of a script: kill -INT is meant.
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._came)
            if hasattr(signal, "pthread_kill"):
                self._watch()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._heard.set()
        if hasattr(self, "_main"):
            signal.set_wakeup_fd(self._wakeup)
            self._ours.close()  # which ends the thread
            self._waker.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Stopped) and error.number != signal.SIGINT:
            end = SystemExit(128 + error.number)
            for note in getattr(error, "__notes__", []):
                end.add_note(note)
            raise end from None

    def check(self) -> None:
        """Between two units of work: end here if it was asked for."""
        if self.signal_number is not None and not (self.busy and self.busy()):
            raise Stopped(self.signal_number)

    def _came(self, number: int, frame: types.FrameType | None) -> None:
        self.at_once = self.signal_number is not None
        self.signal_number = number
        if self.at_once or self.busy is None:
            raise Stopped(number)
        with contextlib.suppress(OSError):  # print is not reentrant, and the terminal may be closed
            os.write(2, b"\nstopping: finishing what takes seconds, and saving; once more leaves at once\n")
        self._remind_later()

    # -- the main thread, woken ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """A signal may reach another thread, and the main one, which waits for a scorer, hears nothing of it: SIGURG,
        which nobody else uses, wakes it, wherever it waits."""
        self._main = threading.get_ident()
        self._before[signal.SIGURG] = signal.signal(signal.SIGURG, self._woken)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._ours = ours
        self._wakeup = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
        self._waker = threading.Thread(target=_wake, args=(theirs, self._main, self._heard), daemon=True)
        self._waker.start()

    def _remind_later(self) -> None:
        self._timer = threading.Timer(GRACE, self._remind)
        self._timer.daemon = True
        self._timer.start()

    def _remind(self) -> None:
        self._overdue = True
        if hasattr(self, "_main"):
            _rouse(self._main, self._heard)

    def _woken(self, number: int, frame: types.FrameType | None) -> None:
        self._heard.set()
        if self._overdue:
            self._overdue = False
            self.check()
            self._remind_later()  # it could not be interrupted now


def _rouse(main: int, heard: threading.Event) -> None:
    """SIGURG to the main thread until it has heard: one that comes just before it begins to wait wakes nobody."""
    heard.clear()
    for _ in range(100):
        signal.pthread_kill(main, signal.SIGURG)
        if heard.wait(0.1):
            return


def _wake(signals: socket.socket, main: int, heard: threading.Event) -> None:
    """Not a method: a thread that kept `busy`, and with it the model, would free tensors while Python shuts down, and
    torch aborts the process then."""
    with signals:
        while came := signals.recv(1):
            if came[0] != signal.SIGURG:
                _rouse(main, heard)

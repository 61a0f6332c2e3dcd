"""Work with a deadline inside this process: a thread that is left behind when it is late.

A thread cannot be killed. Past the deadline the caller goes on and the late thread's answer is thrown away; it is a
daemon, so it cannot keep the interpreter alive. Code that must really be stopped belongs in a `process.Worker`.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["DeadlinePassed", "DeadlineThread"]

T = TypeVar("T")
_Inbox = queue.SimpleQueue  # of (work, outbox) pairs; None ends the thread


class DeadlinePassed(Exception):
    """The work was not done in time. Not a TimeoutError: the work itself may raise those."""


class DeadlineThread:
    """One daemon thread that does one piece of work at a time; started at first use, replaced when late."""

    def __init__(self) -> None:
        self._inbox: _Inbox[Any] | None = None

    def run(self, work: Callable[[], T], timeout: float | None) -> T:
        """What `work()` returns or raises. DeadlinePassed after `timeout` seconds (None waits for ever)."""
        if self._inbox is None:
            self._inbox = queue.SimpleQueue()
            weakref.finalize(self, self._inbox.put, None)  # forgotten without stop(): the thread ends too
            threading.Thread(target=_serve, args=(self._inbox,), daemon=True).start()
        outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._inbox.put((work, outbox))
        try:
            result, error = outbox.get(timeout=timeout)
        except queue.Empty:
            self.stop()
            raise DeadlinePassed from None
        except BaseException:  # Ctrl-C while waiting
            self.stop()
            raise
        if error is not None:
            raise error
        return result

    def stop(self, last: Callable[[], Any] | None = None) -> None:
        """Let the thread end after what it is doing and then `last()`. Does not wait."""
        if self._inbox is not None:
            if last is not None:
                self._inbox.put((last, queue.SimpleQueue()))
            self._inbox.put(None)
            self._inbox = None


def _serve(inbox: _Inbox[Any]) -> None:
    while (item := inbox.get()) is not None:
        work, outbox = item
        try:
            outbox.put((work(), None))
        except BaseException as error:
            outbox.put((None, error))
        del item, work, outbox  # keep nothing of the last batch alive while waiting for the next

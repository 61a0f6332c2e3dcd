"""Calls of processes that may be lost: whoever is gone is replaced by Ray, and another is asked the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lossmith.cluster.placement import import_ray
from lossmith.errors import LossmithError, RunError

__all__ = ["as_ours", "asked", "lost"]

TRIES = 20  # of one call; a process that starts again may be killed again


def asked(what: str, processes: Sequence[Any], calls: Sequence[Callable[[Any], Any]]) -> Iterator[tuple[int, Any]]:
    """(number of the call, its answer) as answers come. calls: of a process, the reference to its answer.

    Call k goes to process k, around; one whose process is lost to the next. RunError: all tries of a call were lost.
    Raises what was raised over there.
    """
    ray = import_ray()
    waiting = {call(processes[k % len(processes)]): (k, 1) for k, call in enumerate(calls)}
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1)
        k, tries = waiting.pop(done[0])
        try:
            answer = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise as_ours(error, what) from None
        except lost() as error:
            if tries == TRIES:
                raise RunError(
                    f"{what} was lost {TRIES} times over the same work, and nothing more is tried. Out of memory? "
                    f"Ray's logs say more (/tmp/ray/session_latest/logs). The last time: {error}"
                ) from None
            time.sleep(min(0.1 * tries**2, 10))  # all of them may be on their way back
            waiting[calls[k](processes[(k + tries) % len(processes)])] = (k, tries + 1)
            continue
        yield k, answer


def lost() -> tuple[type[Exception], ...]:
    """What Ray raises of a call where the process that was asked is gone."""
    errors = import_ray().exceptions
    return errors.RayActorError, errors.OutOfMemoryError


def as_ours(error: Any, what: str) -> Exception:
    """What was raised in another process, to be raised here; with its traceback, where it is no error of ours."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, LossmithError):
        return cause
    ours = RunError(f"{what} failed: {type(cause).__name__}: {cause}")
    ours.add_note(str(error))
    return ours

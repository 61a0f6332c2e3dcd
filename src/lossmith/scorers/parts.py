"""One completion at fault costs itself, not the batch: a call that fails is made again for each half of its batch."""

from __future__ import annotations

import time
from collections.abc import Callable

from lossmith.scorers.function import CallFailure, ScorerBatch, Verdict

__all__ = ["Call", "cut", "in_parts"]

Call = Callable[[ScorerBatch, float | None, bool], list[Verdict]]
"""(batch, seconds or None, whether this is the whole and no part of it) -> a verdict per completion, or CallFailure."""


def in_parts(call: Call, batch: ScorerBatch, timeout: float | None) -> list[Verdict]:
    """One verdict per completion, within `timeout` seconds for all calls together.

    Only failures that one completion can cause (`CallFailure.divisible`: it raised, the process died, the server
    refused what it was sent) are halved; one completion alone that fails has the error.
    """
    end = None if timeout is None else time.monotonic() + timeout
    return _verdicts(call, batch, timeout, end, whole=True)


def _verdicts(
    call: Call, batch: ScorerBatch, timeout: float | None, end: float | None, *, whole: bool
) -> list[Verdict]:
    """As `in_parts`; end: when the time is up, in monotonic seconds."""
    left = timeout if whole or end is None else end - time.monotonic()
    count = len(batch["completions"])
    if left is not None and left <= 0 and not whole:
        return [{"error": f"timeout: no time was left of {timeout:g} s, after a call that failed"}] * count
    try:
        return call(batch, left, whole)
    except CallFailure as failure:
        if count == 1 or not failure.divisible:
            return [{"error": str(failure)}] * count
    halves = cut(batch, (count + 1) // 2)
    return [verdict for half in halves for verdict in _verdicts(call, half, timeout, end, whole=False)]


def cut(batch: ScorerBatch, size: int) -> list[ScorerBatch]:
    """A batch in pieces of at most `size` completions, in order."""
    return [_rows(batch, slice(start, start + size)) for start in range(0, len(batch["completions"]), size)]


def _rows(batch: ScorerBatch, rows: slice) -> ScorerBatch:
    return ScorerBatch(
        prompts=batch["prompts"][rows],
        completions=batch["completions"][rows],
        completion_ids=batch["completion_ids"][rows],
        columns={name: values[rows] for name, values in batch["columns"].items()},
        state=batch.get("state", {}),
    )

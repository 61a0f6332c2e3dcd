"""Scoring functions in the convention of TRL: `def reward(prompts, completions, **columns) -> list[float]`.

Everything is passed by name, as lists of one length: `prompts`, `completions`, `completion_ids` (lists of token ids)
and every column of the prompts. A function without `**kwargs` is given only what it names. A text prompt comes with
text completions; a chat prompt is a list of messages and its completion `[{"role": "assistant", "content": ...}]`.
A prompt that lacks a column has None there. Coroutine functions are awaited.

One difference from TRL: None and NaN are errors here. A function says "no opinion" with ABSTAIN, the string "abstain".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from lossmith.errors import ScorerError, nearest
from lossmith.rewards.deadline import DeadlinePassed, DeadlineThread
from lossmith.rewards.function import Batch, Caller, LoadFailure, Signature
from lossmith.rewards.process import STARTUP_SECONDS, Worker
from lossmith.rollouts import Rollout, Score

__all__ = ["FunctionScorer", "PathScorer", "as_batch"]

OURS = ("prompts", "completions", "completion_ids")
_NOT_COLUMNS = {"prompt", "completion", *OURS}


class FunctionScorer:
    """A live Python function, run in a thread with a deadline.

    A thread cannot be killed: past the limit the run goes on (or stops, loudly) and the late call is left behind.
    Give a path (`PathScorer`) to have a function killed for good, or where it uses `signal.alarm`.

    `columns` are the prompts' column names, None where they are not known yet. Raises ScorerError for a signature
    that cannot work.
    """

    def __init__(self, function: Callable[..., Any], columns: Collection[str] | None = None) -> None:
        try:
            self._caller = Caller(function)
        except LoadFailure as failure:
            raise ScorerError(f"this cannot be a scorer: {failure}") from None
        self.name = self._caller.signature["name"]
        self.columns = columns
        _check_signature(self._caller.signature, columns)
        self._thread = DeadlineThread()

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self.score_within(rollouts, None)

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        batch, caller = as_batch(rollouts, self.columns), self._caller
        try:
            verdicts = self._thread.run(lambda: caller(batch), timeout)
        except DeadlinePassed:
            self._caller = Caller(caller.function)  # the late thread keeps the old one and its event loop
            error = f"timeout: no answer within {timeout:g} s; the call was left behind in its thread"
            return [Score(error=error) for _ in rollouts]
        return [Score(**verdict) for verdict in verdicts]

    def close(self) -> None:
        """End the thread once it is idle."""
        self._thread.stop(last=self._caller.close)


class PathScorer:
    """A function named by its path, `"file.py:function"` or `"module:function"`, run in a process that can be killed.

    The process starts here, so that an import error or a signature that cannot work is a ScorerError at once.
    `columns` are the prompts' column names, None where they are not known yet. `startup` is in seconds.
    """

    def __init__(self, path: str, columns: Collection[str] | None = None, *, startup: float = STARTUP_SECONDS) -> None:
        self.path = path
        self.columns = columns
        self._worker = Worker(path, startup)
        signature = self._worker.start()
        self.name = signature["name"]
        try:
            _check_signature(signature, columns)
        except ScorerError:
            self.close()
            raise

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self.score_within(rollouts, None)

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        verdicts = self._worker.ask(as_batch(rollouts, self.columns), timeout)
        return [Score(**verdict) for verdict in verdicts]

    def close(self) -> None:
        """Kill the process. Asked again, it starts again."""
        self._worker.stop()


def as_batch(rollouts: Sequence[Rollout], columns: Collection[str] | None = None) -> Batch:
    """Rollouts as the lists a scoring function takes; every list is a copy that it may change."""
    pairs = [_prompt_and_completion(rollout) for rollout in rollouts]
    names = set(columns or ()).union(*(rollout.prompt.columns for rollout in rollouts)) - _NOT_COLUMNS
    return Batch(
        prompts=[prompt for prompt, _ in pairs],
        completions=[completion for _, completion in pairs],
        completion_ids=[list(rollout.completion_ids) for rollout in rollouts],
        columns={name: [rollout.prompt.columns.get(name) for rollout in rollouts] for name in sorted(names)},
    )


def _prompt_and_completion(rollout: Rollout) -> tuple[Any, Any]:
    """Text with text, messages with messages; an answer begun in the prompt is put back in front of its end."""
    content = rollout.prompt.content
    if isinstance(content, str):
        return content, rollout.completion
    messages = [dict(message) for message in content]
    begun = messages.pop()["content"] if messages and messages[-1].get("role") == "assistant" else ""
    return messages, [{"role": "assistant", "content": begun + rollout.completion}]


def _check_signature(signature: Signature, columns: Collection[str] | None) -> None:
    name, accepts = signature["name"], signature["accepts"]
    if accepts is not None and "completions" not in accepts:
        takes = ", ".join(accepts) or "nothing"
        raise ScorerError(
            f"scorer {name!r} does not take 'completions' (it takes {takes}). "
            f"Write it as `def {name}(prompts, completions, **columns)` returning one number per completion."
        )
    if columns is None:
        return
    missing = [p for p in signature["required"] if p not in OURS and p not in columns]
    if missing:
        asked = ", ".join(repr(p) for p in missing)
        raise ScorerError(
            f"scorer {name!r} needs {asked}, which the prompts do not have as a column.{nearest(missing[0], columns)}"
            if columns
            else f"scorer {name!r} needs {asked}, and the prompts have no columns. Add the column to the prompts, or "
            "give the parameter a default."
        )

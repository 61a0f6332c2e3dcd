"""The one contract of a reward source, and the one way to call it.

A score is a number, an abstention, or an error of a kind: something that went wrong is never scored 0.

Where one completion can be the cause (`raised`, `worker died`, some of `http`), the scorer is asked again about each
half, and so on: the error is that of the completion at fault, and the others keep their scores.

| kind of error   | what happened                                                        |
|-----------------|----------------------------------------------------------------------|
| `raised`        | the scorer raised (SystemExit and its like included)                  |
| `timeout`       | no answer within the limit                                            |
| `worker died`   | the scorer's process ended: os._exit, a crash in compiled code        |
| `none`          | nothing where a list of scores was due, or null from a server         |
| `not finite`    | NaN or an infinity                                                    |
| `not a number`  | text, a dict, ...                                                     |
| `not a list`    | one thing instead of one score per completion                         |
| `wrong count`   | more or fewer scores than completions                                 |
| `http`          | the server refused, failed, or answered something else than scores    |
| `too long`      | more tokens than the reward model reads                               |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence, Set
from typing import Any, Literal, Protocol, runtime_checkable

from lossmith.errors import ScorerError
from lossmith.rollouts import Rollout, Score
from lossmith.scorers.deadline import DeadlinePassed, DeadlineThread
from lossmith.scorers.function import ABSTAIN
from lossmith.user_code import describe_error

__all__ = [
    "OnError",
    "Scorer",
    "TimedScorer",
    "ask",
    "bind_scorer",
    "close_scorer",
    "columns_read",
    "score_rollouts",
    "verify_scorer",
]

OnError = Literal["stop", "drop"]


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores completions: a name, and one `Score` per rollout in the rollouts' order."""

    @property
    def name(self) -> str: ...

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]: ...


@runtime_checkable
class TimedScorer(Protocol):
    """A scorer that keeps to a time limit by itself. Any other is run in a thread with a deadline."""

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]: ...


def score_rollouts(
    scorer: Scorer, rollouts: Sequence[Rollout], *, on_error: OnError = "stop", timeout: float | None = 60.0
) -> list[Rollout]:
    """The same rollouts, in order, each with its `score`; `timeout` is in seconds for the whole batch, None for none.

    `on_error="stop"` raises ScorerError at the first error, with the prompt and the completion it happened on.
    `on_error="drop"` leaves errors in place as `Score(error=...)`: the caller counts them and leaves them out.
    An abstention stops nothing under either.
    """
    if on_error not in ("stop", "drop"):
        raise ScorerError(f"on_error is 'stop' or 'drop', not {on_error!r}.")
    scores = ask(scorer, rollouts, timeout)
    if on_error == "stop":
        _stop_at_error(scorer.name, rollouts, scores)
    return [dataclasses.replace(rollout, score=score) for rollout, score in zip(rollouts, scores, strict=True)]


def ask(scorer: Scorer, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
    """One valid Score per rollout from any scorer, however badly it behaves. ScorerErrors it raises pass through."""
    if not rollouts:
        return []
    try:
        if isinstance(scorer, TimedScorer):
            scores = scorer.score_within(rollouts, timeout)
        else:
            scores = _in_thread(scorer, rollouts, timeout)
    except DeadlinePassed:
        return _all_failed(f"timeout: no answer within {timeout:g} s", rollouts)
    except (ScorerError, KeyboardInterrupt):
        raise
    except BaseException as error:
        return _all_failed(f"raised: {describe_error(error)}", rollouts)
    if not isinstance(scores, list | tuple):
        return _all_failed(f"not a list: score() returned {type(scores).__name__}", rollouts)
    if len(scores) != len(rollouts):
        return _all_failed(f"wrong count: {len(scores)} scores for {len(rollouts)} completions", rollouts)
    return [_checked(score) for score in scores]


def close_scorer(scorer: Any) -> None:
    """Release what the scorer holds (a process, a thread). Without it they end with the interpreter."""
    close = getattr(scorer, "close", None)
    if callable(close):
        close()


def bind_scorer(scorer: Any, policy: Any) -> None:
    """Give a scorer that reads token ids (one of steps, say) the policy's tokenizer."""
    bind = getattr(scorer, "bind", None)
    if callable(bind):
        bind(policy)


def columns_read(scorer: Any, names: Set[str]) -> set[str]:
    """Which of the prompts' columns the scorer is given: all, where it does not say."""
    reads = getattr(scorer, "columns_read", None)
    return set(names) if reads is None else set(reads(names))


def verify_scorer(scorer: Any) -> None:
    """ScorerError if the scorer is frozen and was changed: what a run says at its end is about one scorer."""
    verify = getattr(scorer, "verify", None)
    if callable(verify):
        verify()


def _in_thread(scorer: Scorer, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
    if timeout is None:
        return scorer.score(rollouts)
    thread = DeadlineThread()
    try:
        return thread.run(lambda: scorer.score(rollouts), timeout)
    finally:
        thread.stop()


def _all_failed(error: str, rollouts: Sequence[Rollout]) -> list[Score]:
    return [Score(error=error) for _ in rollouts]


def _checked(score: Any) -> Score:
    """A Score that says exactly one thing, and whose value, if any, is a finite number."""
    if not isinstance(score, Score):
        return Score(error=f"not a number: score() returned {type(score).__name__} where a Score was due")
    if score.error is not None or (score.abstained and score.value is None):
        return score
    if score.abstained:
        return Score(error=f"not a number: both abstained and {score.value}", parts=score.parts)
    if score.value is None:
        return Score(error="none: neither a value, nor abstained, nor an error", parts=score.parts)
    if not math.isfinite(score.value):
        return Score(error=f"not finite: {score.value}", parts=score.parts)
    return score


def _stop_at_error(name: str, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> None:
    failed = [(rollout, score) for rollout, score in zip(rollouts, scores, strict=True) if score.error is not None]
    if not failed:
        return
    rollout, score = failed[0]
    raise ScorerError(
        f"scorer {name!r} failed on {len(failed)} of {len(rollouts)} completions. The first:\n"
        f"  error:      {score.error}\n"
        f"  prompt:     {_shorten(rollout.prompt.text)} (id {rollout.prompt.id}, sample {rollout.sample})\n"
        f"  completion: {_shorten(rollout.completion)}\n"
        f'Fix the scorer; let it return "{ABSTAIN}" where it has no opinion; or leave such completions out: '
        'scorer_errors = "drop" (on_error in score_rollouts). '
        "They are never scored 0."
    )


def _shorten(text: str, limit: int = 300) -> str:
    """One line that shows both ends of a text."""
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]} ... {text[-limit // 3 :]}"
    return repr(text)

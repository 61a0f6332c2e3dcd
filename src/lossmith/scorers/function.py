"""A scoring function written by a person: inspected, called, and its answer judged.

Standard library only: the worker process loads this file and `user_code.py` by themselves, and must start in a fraction
of a second.
A verdict is the keyword arguments of a `Score`: {"value": 0.5}, {"abstained": True} or {"error": "none: ..."}.

The names and meanings of what a function is given are those of TRL 1.16 (trl/trainer/grpo_trainer.py).
"""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from lossmith.user_code import LoadFailure, describe_error

__all__ = [
    "ABSTAIN",
    "CallFailure",
    "Caller",
    "ScorerBatch",
    "Signature",
    "TrainerState",
    "Verdict",
    "describe",
    "judge",
    "judge_all",
]

ABSTAIN = "abstain"
"""What a scoring function returns for a completion it has no opinion on: the plain string "abstain" (or None)."""

Verdict = dict[str, Any]


class ScorerBatch(TypedDict):
    """One batch as a function sees it: four lists (each column one list) of one length; and where the run stands."""

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    state: NotRequired[dict[str, Any]]  # fields of a TrainerState


class Signature(TypedDict):
    """What a scoring function can be given: `named` parameters, and `anything` where it takes any keyword."""

    name: str
    named: list[str]
    anything: bool
    required: list[str]


@dataclass
class TrainerState:
    """Where a run stands, under the names of transformers' TrainerState that mean something here."""

    global_step: int = 0  # optimizer steps taken
    max_steps: int = 0  # of the whole run; 0 where there is no run
    epoch: float = 0.0  # passes over the prompts so far
    num_train_epochs: int = 0
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state has no {name!r} here; it has {', '.join(self.__dataclass_fields__)}")


class CallFailure(Exception):
    """A call that gave no scores at all. divisible: one of its completions may be the cause, and the others not."""

    def __init__(self, message: str, divisible: bool = False) -> None:
        super().__init__(message)
        self.divisible = divisible


# --- inspecting ------------------------------------------------------------------------------------------------------


def describe(function: Any) -> Signature:
    """The function's name and the keywords it takes. Raises LoadFailure for what cannot be a scoring function."""
    name = getattr(function, "__name__", None) or type(function).__name__
    if inspect.isclass(function):
        raise LoadFailure(f"{name!r} is a class. Make one, `score = {name}(...)`, and name that instead.")
    if not callable(function):
        raise LoadFailure(f"{type(function).__name__} {function!r} cannot be called; a scorer is a function.")
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some compiled functions do not say; the first call will tell
        return Signature(name=name, named=[], anything=True, required=[])
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if positional:
        raise LoadFailure(f"{name!r} takes {', '.join(positional)} by position only; arguments are passed by name.")
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return Signature(
        name=name,
        named=[p.name for p in named],
        anything=anything,
        required=[p.name for p in named if p.default is p.empty],
    )


# --- calling ---------------------------------------------------------------------------------------------------------


class Caller:
    """Calls one function batch by batch and judges what comes back; an exception of theirs is a CallFailure.

    Coroutines share one event loop for the caller's life, so that clients and locks made once keep working.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.signature = describe(function)
        self._runner: Any = None  # asyncio.Runner, made at the first coroutine

    def __call__(self, batch: ScorerBatch) -> list[Verdict]:
        """One verdict per completion. CallFailure: the function raised."""
        count = len(batch["completions"])
        log = _Log(count)
        signature = self.signature
        offered = {
            **batch["columns"],
            "prompts": batch["prompts"],
            "completions": batch["completions"],
            "completion_ids": batch["completion_ids"],
            "trainer_state": TrainerState(**batch.get("state", {})),
            "log_extra": log.extra,
            "log_metric": log.metric,
        }
        given = {key: value for key, value in offered.items() if signature["anything"] or key in signature["named"]}
        if "completions_ids" in signature["named"]:  # as TRL's documentation once spelled it
            given["completions_ids"] = batch["completion_ids"]
        try:
            with _no_grad():
                answer = self.function(**given)
                if inspect.isawaitable(answer):
                    answer = self._wait(answer)
                verdicts = judge_all(answer, count)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a scorer may not end the run behind its back
            raise CallFailure(f"raised: {describe_error(error)}", divisible=True) from None
        return [{**verdict, "logged": row} if row else verdict for verdict, row in zip(verdicts, log.rows, strict=True)]

    def close(self) -> None:
        """Close the event loop, if there is one."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _wait(self, answer: Awaitable[Any]) -> Any:
        import asyncio

        async def wait() -> Any:
            return await answer

        self._runner = self._runner or asyncio.Runner()
        return self._runner.run(wait())


class _Log:
    """What a function says of a batch beside its scores, by completion: TRL's log_extra and log_metric."""

    def __init__(self, count: int) -> None:
        self.rows: list[dict[str, Any]] = [{} for _ in range(count)]

    def extra(self, column: str, values: Iterable[Any]) -> None:
        """A value for each completion."""
        given = list(values)
        if len(given) != len(self.rows):
            raise ValueError(f"log_extra({column!r}) is given {len(given)} values for {len(self.rows)} completions")
        for row, value in zip(self.rows, given, strict=True):
            row[str(column)] = value

    def metric(self, name: str, value: float) -> None:
        """One number for the whole batch."""
        for row in self.rows:
            row[str(name)] = float(value)


def _no_grad() -> Any:
    """torch.no_grad() where torch is loaded, without being the one who loads it."""
    torch = sys.modules.get("torch")
    return torch.no_grad() if torch is not None else contextlib.nullcontext()


# --- judging ---------------------------------------------------------------------------------------------------------


def judge_all(answer: Any, count: int) -> list[Verdict]:
    """One verdict per completion for a whole answer: a list, tuple, or one-dimensional array or tensor of scores."""
    if answer is None:
        return [{"error": "none: the function returned None instead of a list of scores"}] * count
    if not isinstance(answer, list | tuple) and getattr(answer, "ndim", None) == 1:
        answer = _plain(answer)
    if not isinstance(answer, list | tuple):
        shown = f"{type(answer).__name__} {_short(answer)}"
        return [{"error": f"not a list: the function returned {shown} instead of a list of scores"}] * count
    if len(answer) != count:
        return [{"error": f"wrong count: {len(answer)} scores for {count} completions"}] * count
    return [judge(value) for value in answer]


def judge(value: Any) -> Verdict:
    """The verdict on one returned value. Numbers are Python's, numpy scalars and 0-d tensors; a bool is 0 or 1.

    None is an abstention, as in TRL: the function is not applicable to this completion.
    """
    if getattr(value, "ndim", None) == 0:
        value = _plain(value)
    if value is None or (isinstance(value, str) and value == ABSTAIN):
        return {"abstained": True}
    if not isinstance(value, numbers.Real):
        return {"error": f"not a number: {_short(value)} ({type(value).__name__})"}
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return {"value": number} if math.isfinite(number) else {"error": f"not finite: {number}"}


def _plain(array: Any) -> Any:
    """An array or tensor as Python numbers, cut off from any gradient."""
    return array.detach().tolist() if hasattr(array, "detach") else array.tolist()


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."

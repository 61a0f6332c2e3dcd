"""A scoring function written by a person: found, inspected, called, and its answer judged.

Standard library only: the worker process loads this file by itself and must start in a fraction of a second.
A verdict is the keyword arguments of a `Score`: {"value": 0.5}, {"abstained": True} or {"error": "none: ..."}.

The names and meanings of what a function is given are those of TRL 1.16 (trl/trainer/grpo_trainer.py).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import inspect
import math
import numbers
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NotRequired, TypedDict

__all__ = [
    "ABSTAIN",
    "CallFailure",
    "Caller",
    "LoadFailure",
    "ScorerBatch",
    "Signature",
    "TrainerState",
    "Verdict",
    "describe",
    "find_function",
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

    global_step: int = 0  # optimiser steps taken
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


class LoadFailure(Exception):
    """A function that cannot be loaded; `name` was looked for among `known` (both empty for other failures)."""

    def __init__(self, message: str, name: str = "", known: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.name = name
        self.known = sorted(known)


# --- finding ---------------------------------------------------------------------------------------------------------


def find_function(path: str) -> Callable[..., Any]:
    """The object at `"file.py:name"` or `"package.module:name"` (the name may be dotted). Raises LoadFailure."""
    place, _, attribute = path.rpartition(":")
    is_file = place.endswith(".py") or os.sep in place
    if not attribute or not (is_file or all(place.split("."))):
        raise LoadFailure("that is no 'path/file.py:function' and no 'module:function'.")
    try:
        module = _import_file(Path(place).expanduser()) if is_file else _import_module(place)
    except (LoadFailure, KeyboardInterrupt):
        raise
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise LoadFailure(f"{error.filename}, line {error.lineno}: {error.msg}: {line!r}") from error
    except BaseException as error:  # a module may do anything while it is imported, sys.exit() included
        raise LoadFailure(f"importing {place} raised {describe_error(error)}") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise LoadFailure(f"{place} has no {part!r}.", part, _public_callables(found))
        found = getattr(found, part)
    return found


def _import_file(file: Path) -> ModuleType:
    """The file as the `__main__` of this process, as multiprocessing's own children know it.

    So a process pool in it can start by any method: spawn and forkserver load the parent's `__main__` from its file,
    under the name `__mp_main__`, and find functions there. A block under `if __name__ == "__main__"` does not run.
    """
    if file.is_dir():
        raise LoadFailure(f"{str(file)!r} is a folder; write the .py file in it that holds the function.")
    if not file.is_file():
        beside = [str(p) for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise LoadFailure(f"there is no file {str(file)!r} (looked from {Path.cwd()}).", str(file), beside)
    file = file.resolve()
    loader = importlib.machinery.SourceFileLoader("__mp_main__", str(file))
    module = ModuleType("__mp_main__")
    module.__file__ = str(file)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    # Its neighbours can be imported, but none of them, nor itself, hides a module of the standard library.
    library = {str(Path(os.__file__).parent), str(Path(os.__file__).parent / "lib-dynload")}
    after = max((k for k, entry in enumerate(sys.path) if entry in library), default=-1) + 1
    sys.path.insert(after, str(file.parent))
    loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # a console command has no current folder on its path
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise LoadFailure(
                f"there is no module {error.name!r}. Give a file as 'path/file.py:function', or start from the "
                "folder that holds the module."
            ) from error
        raise


def _public_callables(place: Any) -> list[str]:
    return [
        name for name, value in getattr(place, "__dict__", {}).items() if callable(value) and not name.startswith("_")
    ]


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


def describe_error(error: BaseException) -> str:
    """`"KeyError: 'answer' (scorer.py, line 12)"`."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


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

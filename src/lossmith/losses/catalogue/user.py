"""Losses from outside the package: a decorator, "module:function", or an entry point of the group `lossmith.losses`.

A function whose first parameter is `batch` is a loss of the whole batch; one without it builds a composition.

    @register_loss("mine", paper="arXiv:...")
    def mine(batch, *, beta=0.1): ...          # -> a scalar with gradient into batch.logp

    @register_loss("softer")
    def softer(): return get_loss("grpo", trust="sigmoid")
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
from collections.abc import Callable, Collection
from functools import cache
from typing import Any, TypeVar

from lossmith.errors import LossError, nearest
from lossmith.files import text_at_home
from lossmith.losses.catalogue.entry import Entry
from lossmith.losses.function_loss import FunctionLoss, parameters_of, read_fields
from lossmith.losses.loss import Loss
from lossmith.user_code import LoadFailure, load_object

__all__ = ["entries", "from_function", "from_path", "register_loss"]

GROUP = "lossmith.losses"
_REGISTERED: dict[str, Entry] = {}
_SAID = "lossmith_loss"  # attribute of a decorated function: what the decorator was told
Made = TypeVar("Made", bound=Callable[..., Any])


def register_loss(
    name: str | None = None,
    *,
    needs: Collection[str] | None = None,
    stops_gradient: bool = False,
    paper: str = "",
    year: int = 0,
    summary: str = "",
) -> Callable[[Made], Made]:
    """Put a function under a name in the catalogue, for as long as this process lives. See the top of this file.

    needs: fields of Batch it reads besides logp and mask; by default those that its code mentions.
    stops_gradient: part of it depends on logp without gradient, by design (a detached ratio, say).
    """

    def put(function: Made) -> Made:
        said = {"name": name or function.__name__, "needs": needs, "paper": paper, "year": year, "summary": summary}
        said["stops"] = stops_gradient
        setattr(function, _SAID, said)
        entry = from_function(function)
        _REGISTERED[entry.name] = entry
        return function

    return put


def entries() -> dict[str, Entry]:
    """Losses registered in this process, and those of installed packages."""
    return {**_installed(), **_REGISTERED}


@cache
def _installed() -> dict[str, Entry]:
    return {
        point.name: dataclasses.replace(_of_object(point.load(), point.value, point.name), name=point.name)
        for point in importlib.metadata.entry_points(group=GROUP)
    }


def from_path(path: str) -> Entry:
    """The entry of "package.module:function" or "path/file.py:function"."""
    try:
        value = load_object(text_at_home(path, LossError))
    except LoadFailure as failure:
        hint = nearest(failure.name, failure.known) if failure.known else ""
        raise LossError(f"loss {path!r}: {failure}{hint}") from failure
    return _of_object(value, path, path.rpartition(":")[2])


def from_function(function: Callable[..., Any]) -> Entry:
    """The entry of a function itself, decorated or not. LossError: it is no loss."""
    return _of_function(function, f"{function.__module__}:{function.__qualname__}")


def _of_object(found: Any, where: str, name: str) -> Entry:
    if isinstance(found, Loss):
        return Entry(name, 0, "", "a loss of your own", build=lambda: found, origin=where)
    if not callable(found):
        raise LossError(f"{where} is {type(found).__name__}, not a loss or a function.")
    return _of_function(found, where)


def _of_function(function: Callable[..., Any], where: str) -> Entry:
    """The entry of a function, decorated or not. where: how to find it again."""
    said: dict[str, Any] = getattr(function, _SAID, {})
    name = str(said.get("name", getattr(function, "__name__", where)))
    doc = (inspect.getdoc(function) or "a loss of your own").split("\n")[0]
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C, without a signature
        parameters = None
    if parameters is None or inspect.isbuiltin(function):
        raise LossError(f"{where} is no loss, but a function of Python itself.")
    build: Callable[..., Any] = function
    if next(iter(parameters), None) != "batch":
        for p in parameters.values():
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                raise LossError(
                    f"{where} is no loss: its parameter {p.name!r} has no default. A function that builds a loss can "
                    "be called with nothing; one that computes a loss has `batch` as its first parameter."
                )
    else:
        needs = said.get("needs")
        reads = read_fields(function) if needs is None else frozenset(needs)
        opaque = FunctionLoss(name, function, parameters_of(function, skip=1), reads, where, said.get("stops", False))

        def build_opaque() -> Loss:
            return opaque

        build = build_opaque
    summary = said.get("summary") or doc
    return Entry(name, said.get("year", 0), said.get("paper", ""), summary, build=_checked(build, where), origin=where)


def _checked(build: Callable[..., Any], where: str) -> Callable[..., Loss]:
    """The same function, whose result is known to be a loss. Its signature stays visible."""

    def checked(**own: Any) -> Loss:
        made = build(**own)
        if not isinstance(made, Loss):
            raise LossError(
                f"{where} returned {type(made).__name__}, not a loss. A function that builds one returns a PolicyLoss; "
                "a function that computes one has `batch` as its first parameter."
            )
        return made

    checked.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]
    return checked

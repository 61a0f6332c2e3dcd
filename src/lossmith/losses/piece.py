"""A piece: one option on one axis of a loss. A frozen value whose fields are the option's parameters.

A field has two names: the short one used on the piece itself (`Clip(low=0.2)`) and the flat one used where all
axes share one namespace (`get_loss("ppo", clip_low=0.2)`, recipes, the command line).
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from lossmith.errors import LossError, nearest

__all__ = ["Piece", "in_code", "is_number", "number", "options", "param", "pieces_in", "shown", "symbol"]


def param(
    flat: str,
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple = (),
    required: bool = False,
    optional: bool = False,
    bound: bool = False,
) -> Any:
    """A parameter of a piece: its flat name, default, one-line meaning, and range.

    low <= x <= high, above < x, or one of the choices.
    required: the default None only means "not given yet": the loss can be looked at, but not evaluated.
    optional: None is a value too, and means that there is none.
    bound: infinity is a value too, and means that there is no bound.
    """
    meta = {"flat": flat, "doc": doc, "low": low, "above": above, "high": high, "choices": choices}
    meta |= {"required": required, "optional": optional, "bound": bound}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Base of every axis option: what the composition may ask, range checks, short and flat parameter names."""

    option: ClassVar[str] = ""  # its name on its axis
    needs: ClassVar[frozenset[str]] = frozenset()  # batch fields without which it cannot be evaluated
    ordered: ClassVar[tuple[tuple[str, str], ...]] = ()  # pairs of fields of which the first must not be the larger

    # What the composition asks of a piece. A subclass answers with a constant, or with a property of its parameters.
    acts: ClassVar[bool] = True  # it does something; False for the option that switches its axis off
    reads_old: ClassVar[bool] = False  # it reads the old policy's logp itself, whatever the ratio is taken against
    coupling: ClassVar[str] = "token"  # how far rows depend on each other by it: token, sequence, group or batch
    whole_batch: ClassVar[bool] = False  # its objective looks at all tokens of the update at once: no micro-batches
    stops_gradient: ClassVar[bool] = False  # what it gives depends on logp without gradient
    looks_at: ClassVar[frozenset[str]] = frozenset()  # batch fields it reads where given, and does without if not

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(type(self).__name__, field, getattr(self, field.name))
        for low, high in self.ordered:
            a, b = getattr(self, low), getattr(self, high)
            if a > b:
                flat = {field: key for key, field in self.flat_names().items()}
                raise LossError(f"'{self.option}': {flat[low]} = {a} is above {flat[high]} = {b}.")

    @classmethod
    @cache  # asked for every piece whenever a loss is built
    def flat_names(cls) -> Mapping[str, str]:
        """{flat name: field name}."""
        return MappingProxyType({f.metadata["flat"]: f.name for f in dataclasses.fields(cls)})

    def flat(self) -> dict[str, Any]:
        """{flat name: value}."""
        return {flat: getattr(self, name) for flat, name in self.flat_names().items()}

    @property
    def missing(self) -> frozenset[str]:
        """Flat names of required parameters that are not given yet."""
        fields = dataclasses.fields(self)
        return frozenset(f.metadata["flat"] for f in fields if f.metadata["required"] and getattr(self, f.name) is None)

    def given(self, name: str) -> Any:
        """The value of a required field, or a LossError that says how to give it."""
        value = getattr(self, name)
        if value is None:
            flat = {field: key for key, field in self.flat_names().items()}[name]
            raise LossError(f"'{self.option}' needs {flat}, which has no agreed default: pass {flat}=...")
        return value

    def parameters(self) -> Iterator[tuple[str, Any, str]]:
        """(flat name, value, one-line meaning) of each parameter."""
        for field in dataclasses.fields(self):
            yield field.metadata["flat"], getattr(self, field.name), field.metadata["doc"]


def _check(owner: str, field: dataclasses.Field, value: Any) -> None:
    meta, where = field.metadata, f"{owner}.{field.name} (flat name {field.metadata['flat']})"
    if meta["choices"]:
        if not isinstance(value, str) or value not in meta["choices"]:
            raise LossError(f"{where} is {shown(value)}.{nearest(str(value), map(str, meta['choices']))}")
        return
    if isinstance(field.default, tuple):
        if not isinstance(value, (tuple, list)) or not all(is_number(x) and math.isfinite(x) for x in value):
            raise LossError(f"{where} must be a list of numbers, not {shown(value)}.")
        return
    if isinstance(field.default, bool):
        if not isinstance(value, bool):
            raise LossError(f"{where} must be true or false, not {shown(value)}.")
        return
    if value is None and (field.default is None or meta["optional"]):
        return
    if not is_number(value):
        raise LossError(f"{where} must be a number, not {shown(value)}.")
    _check_range(where, field, value)


def _check_range(where: str, field: dataclasses.Field, value: float) -> None:
    meta = field.metadata
    if math.isinf(value) and not meta["bound"]:
        raise LossError(f"{where} must be finite, not {value}.")
    if str(field.type).startswith("int") and not (isinstance(value, int) and abs(value) < 2**53):
        raise LossError(f"{where} must be a whole number, not {shown(value)}.")
    if meta["low"] is not None and value < meta["low"]:
        raise LossError(f"{where} is {value}, but must be at least {meta['low']}.")
    if meta["above"] is not None and value <= meta["above"]:
        raise LossError(f"{where} is {value}, but must be greater than {meta['above']}.")
    if meta["high"] is not None and value > meta["high"]:
        raise LossError(f"{where} is {value}, but must be at most {meta['high']}.")


def is_number(x: Any) -> bool:
    """A number that arithmetic can use: no bool, no NaN, no whole number beyond what a tensor holds."""
    if not isinstance(x, (int, float)) or isinstance(x, bool):
        return False
    return abs(x) < 2**63 if isinstance(x, int) else not math.isnan(x)


def shown(value: Any) -> str:
    """A value as an error message quotes it, however long it is."""
    text = reprlib.repr(value)
    return text if len(text) <= 400 else f"{text[:200]} ..."  # lists in lists in lists


Kind = TypeVar("Kind", bound=Piece)


def options(*pieces: type[Kind]) -> dict[str, type[Kind]]:
    """The options of one axis by name."""
    return {piece.option: piece for piece in pieces}


def pieces_in(kind: type[Kind], *homes: Mapping[str, Any]) -> list[type[Kind]]:
    """The classes of this kind that are options, of these modules (as `vars` gives them), in the order they stand."""
    found = [x for home in homes for x in home.values() if isinstance(x, type) and issubclass(x, kind) and x.option]
    return list(dict.fromkeys(found))


def number(x: float) -> str:
    """A parameter as it reads in a formula: 0.2, 1e-06, ∞; as many digits as it takes, up to twelve."""
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    short = f"{x:.6g}"
    close = abs(float(short) - x) <= 1e-12 * abs(x)
    return (short if close else f"{x:.12g}").replace("-", "−" if x < 0 else "-", 1 if x < 0 else 0)


def in_code(x: float) -> str:
    """A parameter as it reads in a listing: 0.2, torch.inf."""
    return f"{'-' if x < 0 else ''}torch.inf" if math.isinf(x) else str(x)


def symbol(x: float | None, letter: str) -> str:
    """A required parameter as it reads in a formula: its value, or its letter as long as it has none."""
    return letter if x is None else number(x)

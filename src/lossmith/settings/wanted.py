"""What a setting takes, in plain words, read off its declaration."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from lossmith.errors import nearest

__all__ = ["members", "wanted"]

_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def wanted(field: FieldInfo, given: Any) -> str:
    """`"a whole number above 0"`, or the choices and the nearest of them to what was given."""
    kinds = members(field.annotation)
    words = [one for kind in kinds[1:] if typing.get_origin(kind) is Literal for one in typing.get_args(kind)]
    if typing.get_origin(kinds[0]) is Literal:
        choices = [str(choice) for choice in typing.get_args(kinds[0])]
        near = nearest(str(given), choices)
        return f"one of {', '.join(choices)}" + (f" ({near.strip()})" if "Did you mean" in near else "")
    if typing.get_origin(kinds[0]) is dict:
        values = typing.get_args(typing.get_args(kinds[0])[1])
        return f"a table of names, each with one of {', '.join(map(str, values))},"
    if typing.get_origin(kinds[0]) is list:
        return "a list of texts"
    narrowed = typing.get_origin(kinds[0]) is Annotated
    kind, *pieces = typing.get_args(kinds[0]) if narrowed else (kinds[0], *field.metadata)
    pieces = [x for piece in pieces for x in (piece.metadata if isinstance(piece, FieldInfo) else [piece])]
    said = "a number" if float in kinds else _KINDS[kind]
    bounds = " and ".join(filter(None, map(_bound, pieces)))
    return " ".join(filter(None, [said, bounds, *(f"or {word!r}" for word in words)]))


def members(annotation: Any) -> list[Any]:
    """What a value may be, None left out."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
    return [annotation]


def _bound(piece: Any) -> str:
    """A constraint of a field's declaration; one that is none of these is no bound."""
    match piece:
        case Gt(gt=low):
            return f"above {low}"
        case Ge(ge=low):
            return f"of at least {low}"
        case Lt(lt=high):
            return f"below {high}"
        case Le(le=high):
            return f"of at most {high}"
    return ""

"""What a setting takes, in plain words, read off its declaration."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from lossmith.errors import nearest

__all__ = ["wanted"]

_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def wanted(field: FieldInfo, given: Any) -> str:
    """`"a whole number above 0"`, or the choices and the nearest of them to what was given."""
    kinds = _members(field.annotation)
    if typing.get_origin(kinds[0]) is Literal:
        choices = [str(choice) for choice in typing.get_args(kinds[0])]
        near = nearest(str(given), choices)
        return f"one of {', '.join(choices)}" + (f" ({near.strip()})" if "Did you mean" in near else "")
    if typing.get_origin(kinds[0]) is dict:
        values = typing.get_args(typing.get_args(kinds[0])[1])
        return f"a table of names, each with one of {', '.join(map(str, values))},"
    if typing.get_origin(kinds[0]) is list:
        return "a list of texts"
    kind = "a number" if float in kinds else _KINDS[kinds[0]]
    bounds = [_bound(piece) for piece in field.metadata]
    return " ".join([kind, " and ".join(bound for bound in bounds if bound)]).strip()


def _members(annotation: Any) -> list[Any]:
    if isinstance(annotation, types.UnionType):
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

"""A chosen loss: the value of its text, its text after a change, and the controls that its parameters ask for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from lossmith.errors import LossError, quiet_traps
from lossmith.losses import CompletionLoss, Loss, PolicyLoss, describe, find_entry, get_loss
from lossmith.losses.axes.aggregate import AGGREGATE
from lossmith.losses.catalogue.call import read_call
from lossmith.losses.composition.flat import AXES, pieces_of
from lossmith.losses.piece import Piece, number

__all__ = ["MAX_LENGTH", "build", "changed", "controls", "spelled"]

MAX_LENGTH = 8  # tokens, for losses that divide by the token limit: as `lossmith losses show` has them
_WORDS = {
    "truncated": ("keep", "mask", "zero"),
    "masked": ("leave", "keep"),
    "kl_aggregate": ("same", *AGGREGATE),
    "entropy_aggregate": ("same", *AGGREGATE),
}


@lru_cache(maxsize=256)
def build(call: str) -> Loss:
    """The loss of a call, to be looked at: parameters without an agreed default have their example values.

    LossError: as `get_loss`.
    """
    name, given = read_call(call)
    if "name" in given:  # it would be looked up again by that name, which may be code
        raise LossError(f"{name} is shown under its own name: leave name={given['name']!r} out.")
    with quiet_traps():
        loss = get_loss(name, **{**find_entry(name).example, **given})
        return loss.replace(max_length=MAX_LENGTH) if "max_length" in loss.needs else loss


def changed(call: str, name: str, value: Any) -> str:
    """The call of the same loss with one choice or parameter changed. LossError: as the loss refuses it."""
    with quiet_traps():
        loss = build(call).replace(**{name: value})
        if "max_length" in loss.needs:
            loss = loss.replace(max_length=MAX_LENGTH)
    text = spelled(loss, read_call(call)[0])
    build(text)  # what the loss may not be called by this name is refused here
    return text


def spelled(loss: Loss, name: str) -> str:
    """The shortest call by which `get_loss` gives this loss: the choices that are not the entry's, then numbers."""
    flat = {key: value for key, value in loss.to_dict().items() if key not in ("name", "completion", "function")}
    with quiet_traps():
        usual = get_loss(name).to_dict()
        choices = {key: flat[key] for key in ("shaping", *AXES) if key in flat and flat[key] != usual.get(key)}
        try:
            usual = get_loss(name, **choices).to_dict()
        except LossError:  # these choices go together with a number only
            usual |= choices
    rest = {key: value for key, value in flat.items() if usual.get(key, ...) != value}
    if rest.get("max_length") == MAX_LENGTH and usual.get("max_length", ...) is None:
        del rest["max_length"]
    given = ", ".join(f"{key}={_literal(value)}" for key, value in (choices | rest).items())
    return f"{name}({given})" if given else name


def _literal(value: Any) -> str:
    """As a call can say it: infinity has no name there."""
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    return repr(value)


# -- controls ---------------------------------------------------------------------------------------------------------


def controls(loss: Loss, name: str) -> list[dict[str, Any]]:
    """One for each choice and parameter, in the order of `describe`; those that act come as `main`."""
    with quiet_traps():
        usual = get_loss(name).to_dict()
    if isinstance(loss, PolicyLoss):
        fields = {key: (piece, field) for piece in pieces_of(loss).values() for key, field in _fields(piece)}
        return [_control(key, value, doc, usual, *fields.get(key, (None, None))) for key, value, doc in describe(loss)]
    if isinstance(loss, CompletionLoss):
        own = {key: (loss.term, field) for key, field in _fields(loss.term)}
        flat = loss.to_dict()
        return [_control(key, flat[key], f.metadata["doc"], usual, p, f) for key, (p, f) in own.items()]
    flat = {key: value for key, value in loss.to_dict().items() if key not in ("name", "function")}
    return [_control(key, value, "a parameter of the function", usual, None, None) for key, value in flat.items()]


def _fields(piece: Piece) -> Iterator[tuple[str, dataclasses.Field]]:
    for field in dataclasses.fields(piece):
        yield field.metadata["flat"], field


def _control(
    key: str, value: Any, doc: str, usual: dict[str, Any], piece: Piece | None, field: dataclasses.Field | None
) -> dict[str, Any]:
    meta: dict[str, Any] = dict(field.metadata) if field is not None else {}
    choices = meta.get("choices") or _WORDS.get(key) or tuple(AXES.get(key, ()))
    default = field.default if field is not None else usual.get(key, value)
    control = {"name": key, "doc": doc, "main": _acts(key, piece), "optional": key == "advantage_clip"}
    if choices:
        options = list(choices) if value in choices else [value, *choices]
        return control | {"kind": "choice", "value": value, "choices": options}
    if isinstance(value, bool) or isinstance(default, bool):
        return control | {"kind": "flag", "value": value}
    if isinstance(value, (list, tuple, str)):
        items = [value] if isinstance(value, str) else value
        return control | {"kind": "list", "text": ", ".join(map(str, items)), "value": None}
    control["optional"] = key == "advantage_clip" or default is None or bool(meta.get("optional"))
    whole = str(field.type).startswith("int") if field is not None else isinstance(value, int)
    span = _span(usual.get(key), default, value, meta, whole)
    return control | {"kind": "number", "value": _plain(value), "text": _text(value), **span}


def _acts(key: str, piece: Piece | None) -> bool:
    """Whether the parameter belongs to a part that does something, or switches one on."""
    if key in AXES or piece is None:
        return key in ("trust", "advantage", "advantage_scale", "aggregate")
    off = not piece.acts or not getattr(piece, "active", True)
    return (not off and not key.endswith("_coef")) or key == "beta"


def _span(usual: Any, default: Any, value: Any, meta: dict[str, Any], whole: bool) -> dict[str, Any]:
    """The slider's ends and step: the parameter's own range; where that is open, four times the usual value."""
    low, above, high = meta.get("low"), meta.get("above"), meta.get("high")
    known = [abs(x) for x in (usual, default) if isinstance(x, (int, float)) and x and math.isfinite(x)]
    scale = known[0] if known else (1.0 if default is None else 0.25)
    start = low if low is not None else above if above is not None else 0.0
    end = high if high is not None else start + 4 * scale
    finite = [x for x in (value,) if isinstance(x, (int, float)) and math.isfinite(x)]
    start, end = min([start, *finite]), max([end, *finite])
    step = 1.0 if whole else 10.0 ** math.floor(math.log10(max((end - start) / 50, 1e-9)))
    if whole:
        end = max(math.ceil(end), start + 8) if high is None else end
    elif above is not None and low is None and start == above:
        start += step
    return {"low": start, "high": end, "step": step, "whole": whole}


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    return "" if value is None else "inf" if value == math.inf else number(value)

"""Sliders and fields for a loss's parameters, made from what the parameters say of themselves."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lossmith.explorer.chosen import Chosen, value_text
from lossmith.losses import CompletionLoss, PolicyLoss
from lossmith.losses.axes.aggregate import AGGREGATE
from lossmith.losses.axes.shaping import SHAPING
from lossmith.losses.composition.flat import AXES, PLAIN
from lossmith.losses.piece import Piece

__all__ = ["Control", "controls"]

_CHOICES = {
    "truncated": ("keep", "mask", "zero"),
    "masked": ("leave", "keep"),
    "kl_aggregate": ("same", *AGGREGATE),
    "entropy_aggregate": ("same", *AGGREGATE),
    "local_normalizer": ("false", "true"),
}
_SELDOM = ("singleton", "eps", "denominator")


@dataclass(frozen=True)
class Control:
    """name: of its field in the address. slider: (low, high, step), where a range is known or sensible."""

    name: str
    label: str
    doc: str
    value: str
    options: tuple[str, ...] = ()
    slider: tuple[float, float, float] | None = None
    refused: bool = False


def controls(of: Chosen) -> list[tuple[str, list[Control]]]:
    """[(title, controls)]: what moves this loss now, then every other choice."""
    loss = of.loss
    if isinstance(loss, PolicyLoss):
        first, rest = _of_composition(of, loss)
    elif isinstance(loss, CompletionLoss):
        first, rest = _of_piece(of, loss.term), []
    else:
        flat = {} if loss is None else loss.to_dict()
        first = [_plain(of, key, value, "") for key, value in flat.items() if key not in ("name", "function")]
        rest = []
    return [(title, found) for title, found in (("Parameters", first), ("All choices", rest)) if found]


def _of_composition(of: Chosen, loss: PolicyLoss) -> tuple[list[Control], list[Control]]:
    first: list[Control] = []
    rest: list[Control] = []
    axes: dict[str, Piece] = {axis: getattr(loss, axis) for axis in AXES}
    for _, piece in sorted(axes.items(), key=lambda x: x[0] != "trust"):  # what most people come to move
        for one in _of_piece(of, piece):
            (rest if one.label in _SELDOM else first).append(one)
    for axis, piece in axes.items():
        rest.append(_choice(of, axis, f"{axis.replace('_', ' ')}: {_first_sentence(piece)}", piece.option, AXES[axis]))
    for piece in loss.shaping:
        first += _of_piece(of, piece)
    kl = _of_piece(of, loss.kl)
    near = ("beta", "kl_estimator", "kl_place") if loss.kl.active else ("beta",)
    first += [one for one in kl if one.label in near]
    rest += [one for one in kl if one.label not in near]
    coef, *value = _of_piece(of, loss.value)
    (first if loss.value.active else rest).extend([coef, *value])
    rest.append(_plain(of, "shaping", [s.option for s in loss.shaping], f"a list of {', '.join(SHAPING)}"))
    for key, doc in PLAIN.items():
        if key in _CHOICES:
            rest.append(_choice(of, key, doc, value_text(getattr(loss, key)), _CHOICES[key]))
        else:
            rest.append(_plain(of, key, getattr(loss, key), doc, low=0.0 if key == "entropy_coef" else None))
    return first, rest


def _of_piece(of: Chosen, piece: Piece) -> list[Control]:
    found = []
    for field in dataclasses.fields(piece):
        about, value = field.metadata, getattr(piece, field.name)
        if about["choices"] or isinstance(field.default, bool):
            options = about["choices"] or ("false", "true")
            found.append(_choice(of, about["flat"], about["doc"], value_text(value), options))
            continue
        low = about["low"] if about["low"] is not None else about["above"]
        whole = str(field.type).startswith("int")
        usual = field.default if isinstance(field.default, (int, float)) else None
        found.append(
            _plain(of, about["flat"], value, about["doc"], low=low, high=about["high"], whole=whole, usual=usual)
        )
    return found


def _choice(of: Chosen, key: str, doc: str, value: str, options: Any) -> Control:
    name = f"{of.place}.{key}"
    return Control(name, key, doc, value, tuple(dict.fromkeys((*options, value))), refused=of.refused[0] == key)


def _plain(
    of: Chosen, key: str, value: Any, doc: str, *, low: float | None = None, high: float | None = None,
    whole: bool = False, usual: float | None = None,
) -> Control:  # fmt: skip
    refused = of.refused[0] == key
    slider = _slider(value, low, high, whole, usual)
    return Control(f"{of.place}.{key}", key, doc, of.refused[1] if refused else value_text(value), (), slider, refused)


def _slider(
    value: Any, low: float | None, high: float | None, whole: bool, usual: float | None
) -> tuple[float, float, float] | None:
    """None where a slider would not help: no number, an infinite one, or one far below what its step could be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    size = max(abs(value), abs(usual) if usual is not None and math.isfinite(usual) else 0.0)
    if 0 < size < 1e-3:
        return None
    top = high if high is not None and math.isfinite(high) else _round_up(2.5 * size if size else 1.0)
    bottom = low if low is not None else (-top if value < 0 else 0.0)
    if top <= bottom:
        top = bottom + max(1.0, abs(bottom))
    step = max(1.0, _nice((top - bottom) / 200)) if whole or (isinstance(value, int) and size >= 1) else 0.0
    return bottom, top, step or _nice((top - bottom) / 200)


def _round_up(x: float) -> float:
    power = 10.0 ** math.floor(math.log10(x))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= x * 0.999)


def _nice(x: float) -> float:
    return float(f"{10.0 ** math.floor(math.log10(x)):.0e}")


def _first_sentence(piece: Piece) -> str:
    return " ".join((type(piece).__doc__ or "").split("\n\n")[0].split()).split(". ")[0]

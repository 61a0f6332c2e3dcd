"""One namespace for every axis: flat parameters <-> composition.

`advantage="gae"` chooses a piece, `lam=0.95` sets a field of the chosen piece. A parameter that belongs to no chosen
piece is an error, so that nothing a user writes is without effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from lossmith.errors import LossError, nearest
from lossmith.losses.axes.advantage import ADVANTAGE, SCALE
from lossmith.losses.axes.aggregate import AGGREGATE
from lossmith.losses.axes.extra import EXTRA
from lossmith.losses.axes.kl import KL
from lossmith.losses.axes.masks import GROUP_FILTER, SEQUENCE_MASK, TOKEN_MASK
from lossmith.losses.axes.mismatch import MISMATCH
from lossmith.losses.axes.ratio import RATIO
from lossmith.losses.axes.shaping import SHAPING, Shaping
from lossmith.losses.axes.trust import TRUST
from lossmith.losses.axes.value import ValueLoss
from lossmith.losses.composition.composition import Composition
from lossmith.losses.composition.foreign import FOREIGN, nearest_word
from lossmith.losses.composition.house import House
from lossmith.losses.piece import Piece, is_number, shown

__all__ = ["AXES", "all_parameters", "describe", "no_parameter", "to_flat", "with_flat"]

Composed = TypeVar("Composed", bound=Composition)

# axis, the field of Composition -> its options
AXES: dict[str, Mapping[str, type[Piece]]] = {
    "advantage": ADVANTAGE,
    "advantage_scale": SCALE,
    "ratio_level": RATIO,
    "trust": TRUST,
    "token_mask": TOKEN_MASK,
    "sequence_mask": SEQUENCE_MASK,
    "group_filter": GROUP_FILTER,
    "extra": EXTRA,
    "mismatch": MISMATCH,
    "aggregate": AGGREGATE,
}
# choices and numbers of the composition itself, with their meaning
PLAIN = {
    "truncated": "what becomes of completions cut by the token budget: keep, mask or zero",
    "masked": "completions whose tokens are all masked leave the statistics, or keep their reward in them: leave, keep",
    "advantage_mul": "factor of the advantage, after its scale",
    "advantage_clip": "symmetric bound on the advantage; none if not given",
    "entropy_coef": "coefficient of the entropy bonus",
    "kl_aggregate": "how the KL term is aggregated: same, or one of the aggregations",
    "entropy_aggregate": "how the entropy is aggregated: same, or one of the aggregations",
    "local_normalizer": "count over the rows at hand only; micro-batches then do not add up (a trap)",
}
_ALWAYS: dict[str, type[Piece]] = {
    "kl": KL,
    "value": ValueLoss,
}  # pieces that are always there, switched off by a coefficient of 0


def pieces_of(loss: Composition) -> dict[str, Piece]:
    """{where: piece} of everything that has parameters, shaping included."""
    pieces: dict[str, Piece] = {name: getattr(loss, name) for name in (*AXES, *_ALWAYS)}
    return pieces | {f"shaping.{i}": piece for i, piece in enumerate(loss.shaping)}


def to_flat(loss: Composition) -> dict[str, Any]:
    """Every choice and parameter of the composition, in JSON types. In TOML, write None as "none"."""
    flat: dict[str, Any] = {"name": loss.name, "shaping": [s.option for s in loss.shaping]}
    flat |= {axis: getattr(loss, axis).option for axis in AXES}
    flat |= {name: getattr(loss, name) for name in PLAIN}
    for piece in pieces_of(loss).values():
        flat |= {key: list(x) if isinstance(x, tuple) else x for key, x in piece.flat().items()}
    return flat


def with_flat(loss: Composed, changes: Mapping[str, Any]) -> Composed:
    """The composition with these parameters, options of an axis, or pieces changed."""
    changes = dict(changes)
    fields: dict[str, Any] = {"name": changes.pop("name", loss.name)}
    if not isinstance(fields["name"], str) or not fields["name"].strip():
        raise LossError(f"the name of a loss is text, not {shown(fields['name'])}.")
    for axis, known in AXES.items():
        fields[axis] = _chosen(axis, known, changes.pop(axis, getattr(loss, axis)), loss)
    fields |= {name: changes.pop(name, getattr(loss, name)) for name in PLAIN}
    fields["advantage_clip"] = _none(fields["advantage_clip"])
    for name, kind in _ALWAYS.items():
        fields[name] = changes.pop(name) if isinstance(changes.get(name), kind) else getattr(loss, name)
    fields["shaping"] = _shaping(changes.pop("shaping", loss.shaping), loss)
    _expand_clip(loss.name, changes, fields["trust"])
    owners = [*fields["shaping"], *(v for v in fields.values() if isinstance(v, Piece))]
    _refuse_unowned(loss.name, changes, owners)
    fields["shaping"] = tuple(_set(piece, changes) for piece in fields["shaping"])
    fields |= {name: _set(piece, changes) for name, piece in fields.items() if isinstance(piece, Piece)}
    return dataclasses.replace(loss, **fields)


def _chosen(axis: str, known: Mapping[str, type[Piece]], option: Any, loss: Composition) -> Piece:
    """The piece for this option, with the numbers that go with it."""
    current: Piece = getattr(loss, axis)
    option = "none" if option is None and "none" in known else option
    if isinstance(option, Piece):
        return option
    if not isinstance(option, str) or option not in {*known, current.option}:
        # as runs with rollout_is wrote it before
        renamed = " It is now called trust='band'." if axis == "trust" and str(option) == "icepop" else ""
        raise LossError(f"{axis} is {shown(option)}.{renamed}{nearest(str(option), known)}")
    if option == current.option:
        return current
    return _new(axis, known[option], current, loss.house)


def _new(axis: str, option: type[Piece], current: Piece, house: House | None) -> Piece:
    """An option just chosen. What was chosen on purpose stays: a preset's numbers are its library's, all of them;
    of a loss of a paper, the numbers that are not the old option's own defaults.
    """
    kept = current.flat()
    if house is None and axis != "ratio_level":
        usual = {f.metadata["flat"]: f.default for f in dataclasses.fields(current)}
        kept = {k: v for k, v in kept.items() if v != usual[k]}
    filled = {} if house is None else {k: v for k, v in house.of(axis, option).items() if k not in kept}
    return _as_far_as_legal(_as_far_as_legal(option(), kept), filled)


def _as_far_as_legal(piece: Piece, numbers: Mapping[str, Any]) -> Piece:
    """The piece with these numbers, without those that it cannot have: "no cap" is known to some options only."""
    with suppress(LossError):
        return _set(piece, numbers)
    for flat, value in numbers.items():
        with suppress(LossError):
            piece = _set(piece, {flat: value})
    return piece


def _expand_clip(name: str, changes: dict[str, Any], trust: Any) -> None:
    """`clip=0.1` is short for clip_low=0.1 and clip_high=0.1; it never moves one bound only."""
    if "clip" not in changes:
        return
    bounds, value = ("clip_low", "clip_high"), changes.pop("clip")
    if not isinstance(trust, Piece) or not set(bounds) <= set(type(trust).flat_names()):
        raise LossError(f"clip has no effect on {name}: it sets clip_low and clip_high, which belong to trust='clip'.")
    if any(bound in changes for bound in bounds):
        raise LossError("clip sets both clip_low and clip_high: give either clip or the two bounds.")
    changes |= dict.fromkeys(bounds, value)


def _shaping(names: Any, loss: Composition) -> tuple[Shaping, ...]:
    names = () if names is None or _none(names) is None else (names,) if isinstance(names, (str, Shaping)) else names
    if not isinstance(names, (list, tuple)):
        raise LossError(f"shaping is a list of {', '.join(SHAPING)}, not {shown(names)}.")
    now = {type(piece): piece for piece in loss.shaping}
    made: list[Shaping] = []
    for name in names:
        if not isinstance(name, Shaping) and (not isinstance(name, str) or name not in SHAPING):
            raise LossError(f"shaping is {shown(name)}.{nearest(str(name), SHAPING)}")
        if isinstance(name, str):
            option = SHAPING[name]
            made.append(now.get(option) or option())
        else:
            made.append(name)
    return tuple(made)


def _set(piece: Piece, changes: Mapping[str, Any]) -> Piece:
    mine = {field: _none(changes[flat]) for flat, field in type(piece).flat_names().items() if flat in changes}
    mine = {field: tuple(x) if isinstance(x, list) else x for field, x in mine.items()}
    return dataclasses.replace(piece, **mine) if mine else piece


def _none(value: Any) -> Any:
    """TOML has no null: the word "none" stands for it, where a parameter is a number."""
    return None if isinstance(value, str) and value == "none" else value


def _refuse_unowned(name: str, changes: Mapping[str, Any], owners: list[Piece]) -> None:
    owned = {flat for piece in owners for flat in type(piece).flat_names()}
    for flat, value in changes.items():
        if flat == "kl_target" and is_number(value):
            raise LossError(f"{FOREIGN[flat].said(flat, value, owned)}")
        if flat not in owned:
            raise no_parameter(name, flat, value, [*owned, *AXES, *PLAIN, "shaping", "clip"])


def no_parameter(loss: str, flat: str, value: Any, owned: Collection[str]) -> LossError:
    """Why this loss, which has the parameters `owned`, has not this one: another library's word, or without effect."""
    if flat in FOREIGN:
        ours = FOREIGN[flat].ours
        homes = list(dict.fromkeys(home for x in ours for home in _homes(x))) if not {*ours} & {*owned} else []
        lost = f" On {loss} that has no effect: it belongs to {_one_of(homes)}." if homes else ""
        return LossError(f"{loss} has no parameter {flat!r}: {FOREIGN[flat].said(flat, value, owned)}{lost}")
    if _homes(flat):
        return LossError(f"{flat} has no effect on {loss}: it belongs to {_one_of(_homes(flat))}.")
    if flat in (docs := all_parameters()):
        return LossError(f"{loss} has no parameter {flat!r} ({docs[flat]}). It has: {', '.join(sorted(owned))}.")
    word = nearest_word(flat, owned)
    return LossError(
        f"{loss} has no parameter {flat!r}"
        + (f": {FOREIGN[word].said(word, value, owned)}" if word else f".{nearest(flat, owned)}")
    )


def _one_of(homes: list[str]) -> str:
    return " or ".join(homes) if len(homes) < 5 else " or ".join(homes[:3]) + " among others"


def _homes(flat: str) -> list[str]:
    """Where a parameter would take effect: "trust='clip'"."""
    return [
        f"{axis}={option!r}"
        for axis, known in [*AXES.items(), ("shaping", SHAPING)]
        for option, piece in known.items()
        if flat in piece.flat_names()
    ]


def describe(loss: Composition) -> list[tuple[str, Any, str]]:
    """(flat name, value, one-line meaning) of every choice and parameter of this composition."""
    meaning = all_parameters()
    for piece in pieces_of(loss).values():
        meaning |= {flat: doc for flat, _, doc in piece.parameters()}
    return [(flat, value, meaning[flat]) for flat, value in to_flat(loss).items() if flat != "name"]


def all_parameters() -> dict[str, str]:
    """{flat name: one-line meaning} of every axis, choice and parameter there is."""
    docs = {axis: f"one of {', '.join(known)}" for axis, known in AXES.items()}
    docs["shaping"] = f"a list of {', '.join(SHAPING)}, applied in that order"
    docs["clip"] = "short for clip_low and clip_high at once"
    docs |= PLAIN
    classes = [c for known in AXES.values() for c in known.values()] + list(SHAPING.values())
    for piece in (*classes, KL, ValueLoss):
        docs |= {f.metadata["flat"]: f.metadata["doc"] for f in dataclasses.fields(piece)}
    return docs

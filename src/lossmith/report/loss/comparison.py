"""Losses side by side: what differs in formula, weight, advantage, and defaults, as plain data."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lossmith.errors import LossError
from lossmith.losses import Batch, Loss, PolicyLoss, all_parameters, example_loss, find_entry
from lossmith.losses.composition.flat import AXES

__all__ = ["RATIOS", "Comparison", "Difference", "advantages", "changes_of_preset", "compare", "weights"]

RATIOS = (0.1, 0.5, 0.9, 1.0, 1.15, 1.5, 2.5, 10.0)
REWARDS = ((1, 0, 0, 0), (1, 1, 1, 0), (1, 1, 1, 1))
ABSENT = "·"  # the parameter is not part of this loss


@dataclass(frozen=True)
class Difference:
    """One flat parameter, or axis, whose value is not the same in all losses."""

    name: str
    meaning: str
    values: tuple[str, ...]  # one for each loss; ABSENT where it has no such parameter
    words: tuple[str, ...] = ()  # of an axis: what each choice says of itself


@dataclass(frozen=True)
class Comparison:
    """Everything `lossmith losses compare` shows. Position i belongs to names[i]."""

    names: tuple[str, ...]
    formulas: tuple[str, ...]
    weights: dict[str, tuple[tuple[float, ...] | None, ...]]  # {"A > 0": w at RATIOS, None where there is none}
    advantages: dict[
        tuple[int, ...], tuple[tuple[float, ...] | str, ...]
    ]  # {rewards of a group: A, or why there is none}
    differences: tuple[Difference, ...]
    same: tuple[tuple[str, str], ...]  # names of one and the same composition


def compare(losses: Sequence[Loss]) -> Comparison:
    """What is the same in these losses and what is not. LossError: fewer than two."""
    if len(losses) < 2:
        raise LossError("comparing takes at least two losses: lossmith losses compare grpo dr_grpo")
    names = _headings(losses)
    by_weight = [weights(loss) for loss in losses]
    return Comparison(
        names=names,
        formulas=tuple(loss.formula() for loss in losses),
        weights={sign: tuple(None if w is None else w[sign] for w in by_weight) for sign in ("A > 0", "A < 0")},
        advantages={rewards: tuple(advantages(loss, rewards) for loss in losses) for rewards in REWARDS},
        differences=tuple(_differences(losses)),
        same=tuple(
            (names[i], names[j])
            for (i, a), (j, b) in itertools.combinations(enumerate(losses), 2)
            if type(a) is type(b) and a.to_dict() | {"name": ""} == b.to_dict() | {"name": ""}
        ),
    )


def _headings(losses: Sequence[Loss]) -> tuple[str, ...]:
    """The losses' names with what was changed in them, as one would ask for them: grpo, grpo(beta=0.1)."""
    found: list[str] = []
    for loss in losses:
        changes = ", ".join(
            f"{key}={value!r}" if isinstance(value, str) else f"{key}={_value(value)}"
            for key, value in _changed(loss, losses).items()
        )
        found.append(f"{loss.name}({changes})" if changes else loss.name)
    twice = {name for name in found if found.count(name) > 1}  # one and the same loss: numbered
    return tuple(f"{name} #{found[: i + 1].count(name)}" if name in twice else name for i, name in enumerate(found))


def _changed(loss: Loss, losses: Sequence[Loss]) -> dict[str, Any]:
    """Flat parameters that are not as the catalogue's entry of this name has them.

    Of a loss without an entry (a file's, say), those that differ between the compared losses of its name.
    """
    flat = {key: value for key, value in loss.to_dict().items() if key != "name"}
    try:
        usual = [example_loss(loss.name).to_dict()]
    except LossError:
        usual = [other.to_dict() for other in losses if other.name == loss.name]
    return {key: value for key, value in flat.items() if any(one.get(key, ABSENT) != value for one in usual)}


def weights(loss: Loss) -> dict[str, tuple[float, ...]] | None:
    """w(r, A) at RATIOS for either sign of A; None for a loss without a weight per token."""
    ratio = torch.tensor(RATIOS, dtype=torch.float64)
    try:
        return {sign: tuple(loss.weight(ratio, a).tolist()) for sign, a in (("A > 0", 1.0), ("A < 0", -1.0))}
    except (NotImplementedError, LossError):  # no weight per token, or a parameter that is not given yet
        return None


def advantages(loss: Loss, rewards: Sequence[float]) -> tuple[float, ...] | str:
    """A of one group of completions of one token with these rewards; or, in words, why there is none."""
    if not isinstance(loss, PolicyLoss):
        return "no advantage"
    n = len(rewards)
    zero, row = torch.zeros(n, 1, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
    known: dict[str, Any] = {"reward": torch.tensor(rewards, dtype=torch.float64), "group": row, "lag": row}
    known |= dict.fromkeys(("old_logp", "behavior_logp", "ref_logp", "entropy", "full_kl"), zero)
    known |= dict.fromkeys(("truncated", "off_policy"), row.bool())
    missing = loss.needs - known.keys()
    if missing:
        return "needs " + ", ".join(sorted(missing))
    batch = Batch(zero, torch.ones(n, 1, dtype=torch.bool), **known)
    return tuple(loss.credit(batch).advantage[:, 0].tolist())


def _differences(losses: Sequence[Loss]) -> list[Difference]:
    """Axes first, then what is left of the parameters; each only where it differs."""
    flats = [loss.to_dict() for loss in losses]
    docs, keys = all_parameters(), list(dict.fromkeys(key for flat in flats for key in flat if key != "name"))
    found = []
    for key in sorted(keys, key=lambda k: (k not in AXES, keys.index(k))):
        values = tuple(_value(flat[key]) if key in flat else ABSENT for flat in flats)
        if ABSENT in values and all(
            _by_default(loss, key) for loss, flat in zip(losses, flats, strict=True) if key in flat
        ):
            continue  # it came with another choice on its axis, which is said already
        if len(set(values)) > 1:
            words = tuple(_says(loss, key) for loss in losses) if key in AXES else ()
            found.append(Difference(key, docs.get(key, ""), values, words))
    return found


def _by_default(loss: Loss, flat: str) -> bool:
    """Whether this parameter has the default of the piece that it belongs to."""
    for piece in getattr(loss, "pieces", ()):
        for field in dataclasses.fields(piece):
            if field.metadata["flat"] == flat:
                return bool(getattr(piece, field.name) == field.default)
    return False


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None or value == [] else str(value)


def _says(loss: Loss, axis: str) -> str:
    """The first sentence of what the chosen piece says of itself."""
    piece = getattr(loss, axis, None)
    if piece is None:
        return "no such axis"
    doc = " ".join((inspect.getdoc(type(piece)) or "").split("\n\n")[0].split())
    doc = re.sub(r"\s*\((?:[^()]*arXiv|book)[^()]*\)", "", doc)
    return re.split(r"\.(?:\s|$)", doc)[0]


def changes_of_preset(name: str) -> list[Difference]:
    """What a preset changes in the loss it starts from: values are (the base's, the preset's)."""
    entry = find_entry(name)
    if not entry.preset_of:
        return []
    return _differences([example_loss(entry.preset_of), example_loss(entry.name)])

"""Compositions that mean nothing are refused when the loss is built, with the reason."""

from __future__ import annotations

import math

from lossmith.errors import LossError, nearest
from lossmith.losses.axes.advantage import Estimator, Scale
from lossmith.losses.axes.aggregate import AGGREGATE, Aggregate
from lossmith.losses.axes.extra import Extra
from lossmith.losses.axes.kl import KL
from lossmith.losses.axes.masks import GroupFilter, Mask
from lossmith.losses.axes.mismatch import Mismatch
from lossmith.losses.axes.ratio import Ratio, TokenRatio
from lossmith.losses.axes.shaping import Shaping
from lossmith.losses.axes.trust import Trust
from lossmith.losses.axes.value import ValueLoss
from lossmith.losses.composition.composition import Composition
from lossmith.losses.piece import is_number, shown

__all__ = ["check_legal"]

TRUNCATED = ("keep", "mask", "zero")
KINDS = {
    "advantage": Estimator,
    "advantage_scale": Scale,
    "ratio_level": Ratio,
    "trust": Trust,
    "group_filter": GroupFilter,
    "token_mask": Mask,
    "sequence_mask": Mask,
    "extra": Extra,
    "mismatch": Mismatch,
    "kl": KL,
    "value": ValueLoss,
    "aggregate": Aggregate,
}


def check_legal(loss: Composition) -> None:
    """Raise LossError with the reason if the composition is meaningless."""
    for axis, kind in KINDS.items():
        if not isinstance(getattr(loss, axis), kind):
            raise LossError(f"{axis} must be a {kind.__name__}, not {shown(getattr(loss, axis))}.")
    if not isinstance(loss.shaping, tuple) or not all(isinstance(x, Shaping) for x in loss.shaping):
        raise LossError(f"shaping must be a tuple of Shaping, not {shown(loss.shaping)}.")
    _check_choice("truncated", loss.truncated, TRUNCATED)
    _check_choice("masked", loss.masked, ("leave", "keep"))
    for name in ("kl_aggregate", "entropy_aggregate"):
        chosen = getattr(loss, name)
        if not isinstance(chosen, str) or chosen != "same":  # an array is compared element by element
            known = (k for k in AGGREGATE if not AGGREGATE[k]().missing)  # those that need no parameter of their own
            _check_choice(name, chosen, ("same", *known))
    if not isinstance(loss.local_normalizer, bool):
        raise LossError(f"local_normalizer must be true or false, not {shown(loss.local_normalizer)}.")
    if not is_number(loss.advantage_mul) or math.isinf(loss.advantage_mul) or loss.advantage_mul == 0:
        raise LossError(f"advantage_mul must be a number other than 0, not {shown(loss.advantage_mul)}.")
    if not is_number(loss.entropy_coef) or not 0 <= loss.entropy_coef < math.inf:
        raise LossError(f"entropy_coef must be a number of at least 0, not {shown(loss.entropy_coef)}.")
    bound = loss.advantage_clip
    if bound is not None and not (is_number(bound) and bound >= 0):
        raise LossError(f"advantage_clip must be a number of at least 0, not {shown(bound)}.")
    if bound == 0:
        raise LossError("advantage_clip = 0 leaves no advantage: give a number above 0, or none.")
    for reason in _illegal(loss):
        raise LossError(f"{loss.name}: {reason}.")


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise LossError(f"{name} is {shown(value)}.{nearest(str(value), known)}")


def _illegal(loss: Composition) -> list[str]:
    return [reason for reason in (*_ratio_reasons(loss), *_credit_reasons(loss), *_name_reasons(loss)) if reason]


def _ratio_reasons(loss: Composition) -> list[str]:
    reasons = []
    advantage, ratio, trust = loss.advantage, loss.ratio_level, loss.trust
    if ratio.per_sequence and advantage.per_token and trust.through == "ratio":
        reasons.append(
            f"advantage='{advantage.option}' differs between tokens, but ratio_level='{ratio.option}' has one number a "
            "completion; use ratio_level='sequence_token' or 'token'"
        )
    if not loss.needs_ratio and ratio != TokenRatio():
        reasons.append(
            f"trust='{trust.option}' does not use a ratio, so ratio_level='{ratio.option}' with "
            f"denominator='{ratio.denominator}' would have no effect"
        )
    if trust.token_only and ratio.option != "token":
        reasons.append(
            f"trust='{trust.option}' is defined on the ratio of each token; ratio_level='{ratio.option}' would be "
            "another loss"
        )
    return reasons


def _credit_reasons(loss: Composition) -> list[str]:
    reasons = []
    advantage, scale = loss.advantage, loss.advantage_scale
    if advantage.per_token and not scale.per_token:
        reasons.append(
            f"advantage='{advantage.option}' is per token, but advantage_scale='{scale.option}' divides by a statistic "
            "of whole completions; use 'whiten' or 'none'"
        )
    if scale.acts and not advantage.scalable:
        reasons.append(f"advantage='{advantage.option}' is not scaled: advantage_scale='{scale.option}' has no effect")
    others = (loss.kl.active, loss.value.active, loss.entropy_coef, loss.extra.acts)
    if not advantage.acts and not any(others):
        reasons.append(f"advantage='{advantage.option}' leaves nothing: give beta, value_coef, entropy_coef or extra")
    if loss.value.active and advantage.acts and not advantage.critic:
        reasons.append(
            f"value_coef={loss.value.coef:g} trains a critic that advantage='{advantage.option}' never reads; use "
            "advantage='gae', 'td' or 'mc', or value_coef=0"
        )
    return reasons


def _name_reasons(loss: Composition) -> list[str]:
    """One flat name can say one value only."""
    seen: dict[str, tuple[str, object]] = {}
    reasons = []
    for piece in loss.pieces:
        for flat, value in piece.flat().items():
            owner, known = seen.setdefault(flat, (piece.option or type(piece).__name__, value))
            if known != value:
                mine = piece.option or type(piece).__name__
                reasons.append(
                    f"{flat} is {known!r} in '{owner}' and {value!r} in '{mine}'; both read it, so it must agree"
                )
    return reasons

"""Compositions that mean nothing are refused when the loss is built, with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lossmith.errors import LossError, nearest
from lossmith.losses.advantage import Critic, Estimator, Given, NoScale, Scale, Whiten, Zero
from lossmith.losses.aggregate import AGGREGATE, Aggregate
from lossmith.losses.correction import Mismatch
from lossmith.losses.extra import Extra, NoExtra
from lossmith.losses.kl import KL
from lossmith.losses.masks import GroupFilter, Mask
from lossmith.losses.ratio import Ratio, TokenRatio
from lossmith.losses.trust import Trust
from lossmith.losses.value import ValueLoss

if TYPE_CHECKING:
    from lossmith.losses.policy_loss import PolicyLoss

__all__ = ["check_legal"]

TRUNCATED = ("keep", "mask", "zero")
KINDS = {
    "advantage": Estimator,
    "scale": Scale,
    "ratio": Ratio,
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


def check_legal(loss: PolicyLoss) -> None:
    """Raise LossError with the reason if the composition is meaningless."""
    for axis, kind in KINDS.items():
        if not isinstance(getattr(loss, axis), kind):
            raise LossError(f"{axis} must be a {kind.__name__}, not {getattr(loss, axis)!r}.")
    _check_choice("truncated", loss.truncated, TRUNCATED)
    for name in ("kl_aggregate", "entropy_aggregate"):
        known = tuple(k for k in AGGREGATE if not AGGREGATE[k]().missing)  # those that need no parameter of their own
        _check_choice(name, getattr(loss, name), ("same", *known))
    if not isinstance(loss.local_normalizer, bool):
        raise LossError(f"local_normalizer must be true or false, not {loss.local_normalizer!r}.")
    if isinstance(loss.advantage_mul, bool) or not isinstance(loss.advantage_mul, (int, float)):
        raise LossError(f"advantage_mul must be a number, not {loss.advantage_mul!r}.")
    for name, bound in (("advantage_clip", loss.advantage_clip), ("entropy_coef", loss.entropy_coef)):
        if bound is not None and not (isinstance(bound, (int, float)) and bound >= 0):
            raise LossError(f"{name} must be a number of at least 0, not {bound!r}.")
    for reason in _illegal(loss):
        raise LossError(f"{loss.name}: {reason}.")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise LossError(f"{name} is {value!r}.{nearest(str(value), known)}")


def _illegal(loss: PolicyLoss) -> list[str]:
    return [reason for reason in (*_ratio_reasons(loss), *_credit_reasons(loss), *_name_reasons(loss)) if reason]


def _ratio_reasons(loss: PolicyLoss) -> list[str]:
    reasons = []
    advantage, ratio, trust = loss.advantage, loss.ratio, loss.trust
    if ratio.per_sequence and advantage.per_token and trust.through == "ratio":
        reasons.append(
            f"advantage='{advantage.option}' differs between tokens, but ratio_level='{ratio.option}' has one number a "
            "completion; use ratio_level='sequence_token' or 'token'"
        )
    by_kl = loss.kl.uses_ratio
    if not trust.uses_ratio and not by_kl and ratio != TokenRatio():
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


def _credit_reasons(loss: PolicyLoss) -> list[str]:
    reasons = []
    advantage, scale = loss.advantage, loss.scale
    if advantage.per_token and not isinstance(scale, (NoScale, Whiten)):
        reasons.append(
            f"advantage='{advantage.option}' is per token, but advantage_scale='{scale.option}' divides by a statistic "
            "of whole completions; use 'whiten' or 'none'"
        )
    if isinstance(advantage, (Given, Zero)) and not isinstance(scale, NoScale):
        reasons.append(f"advantage='{advantage.option}' is not scaled: advantage_scale='{scale.option}' has no effect")
    if isinstance(advantage, Zero) and not any((loss.kl.active, loss.value.active, loss.entropy_coef, _extra(loss))):
        reasons.append("advantage='zero' leaves nothing: give beta, value_coef, entropy_coef or extra")
    if loss.value.active and not isinstance(advantage, (Critic, Zero)):
        reasons.append(
            f"value_coef={loss.value.coef:g} trains a critic that advantage='{advantage.option}' never reads; use "
            "advantage='gae', 'td' or 'mc', or value_coef=0"
        )
    return reasons


def _extra(loss: PolicyLoss) -> bool:
    return not isinstance(loss.extra, NoExtra)


def _name_reasons(loss: PolicyLoss) -> list[str]:
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

"""Compositions that mean nothing are refused when the loss is built, with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lossmith.errors import LossError, nearest
from lossmith.losses.advantage import Critic, Estimator, NoScale, Scale, Whiten
from lossmith.losses.aggregate import Aggregate
from lossmith.losses.correction import Mismatch
from lossmith.losses.kl import KL
from lossmith.losses.ratio import Ratio, TokenRatio
from lossmith.losses.trust import Trust
from lossmith.losses.value import ValueLoss

if TYPE_CHECKING:
    from lossmith.losses.policy_loss import PolicyLoss

__all__ = ["check_legal"]

TRUNCATED = ("keep", "mask", "zero")
GROUP_FILTERS = ("none", "zero_variance")
KINDS = {
    "advantage": Estimator,
    "scale": Scale,
    "ratio": Ratio,
    "trust": Trust,
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
    _check_choice("group_filter", loss.group_filter, GROUP_FILTERS)
    for name, bound in (("advantage_clip", loss.advantage_clip), ("entropy_coef", loss.entropy_coef)):
        if bound is not None and not (isinstance(bound, (int, float)) and bound >= 0):
            raise LossError(f"{name} must be a number of at least 0, not {bound!r}.")
    for reason in _illegal(loss):
        raise LossError(f"{loss.name}: {reason}.")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise LossError(f"{name} is {value!r}.{nearest(str(value), known)}")


def _illegal(loss: PolicyLoss) -> list[str]:
    reasons = []
    advantage, scale, ratio, trust = loss.advantage, loss.scale, loss.ratio, loss.trust
    if ratio.per_sequence and advantage.per_token:
        reasons.append(
            f"advantage='{advantage.option}' differs between tokens, but ratio_level='{ratio.option}' has one number a "
            "completion; use ratio_level='sequence_token' or 'token'"
        )
    by_ratio = trust.uses_ratio or (loss.kl.active and loss.kl.ratio_weight)
    if not by_ratio and ratio != TokenRatio():
        reasons.append(
            f"trust='{trust.option}' does not use a ratio, so ratio_level='{ratio.option}' with "
            f"denominator='{ratio.denominator}' would have no effect"
        )
    if advantage.per_token and not isinstance(scale, (NoScale, Whiten)):
        reasons.append(
            f"advantage='{advantage.option}' is per token, but advantage_scale='{scale.option}' divides by a statistic "
            "of whole completions; use 'whiten' or 'none'"
        )
    if loss.value.active and not isinstance(advantage, Critic):
        reasons.append(
            f"value_coef={loss.value.coef:g} trains a critic that advantage='{advantage.option}' never reads; use "
            "advantage='gae', 'td' or 'mc', or value_coef=0"
        )
    return reasons

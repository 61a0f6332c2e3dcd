"""What every hook has in common: credit from the fields that a trainer gives, and the objective on some of the rows.

A hook that carries tensors with their rows takes the whole credit along. Through the others only an advantage comes
back: there the objective half runs on advantages that are given, and 1/Z is made of the trainer's counts, or is a
factor of the advantage (which is right where the loss is homogeneous in A).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lossmith.errors import quiet_traps
from lossmith.losses import KL, Batch, Normalizer, PolicyLoss
from lossmith.losses.loss import Loss, LossOutput

__all__ = ["estimator", "folded", "given", "objective", "wide"]


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where it is that: what losses are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def estimator(loss: Loss) -> Loss:
    """The loss whose credit half is asked for advantages and 1/Z alone: u is made beside the objective."""
    with quiet_traps():  # they were told when the loss was built
        return loss.replace(mismatch="none") if isinstance(loss, PolicyLoss) else loss


def given(loss: Loss, aggregate: str | None = None) -> Loss:
    """The loss's objective half alone, on advantages that are given; aggregate: another than its own.

    A local normaliser means all rows of an update here, as it does in Lossmith's own loop.
    """
    if not isinstance(loss, PolicyLoss):
        return loss
    changes = {"local_normalizer": False, **({"aggregate": aggregate} if aggregate else {})}
    if loss.advantage.acts:
        changes |= {"advantage": "given", "advantage_scale": "none"}
    credit = {"shaping": (), "group_filter": "none", "truncated": "keep"}
    kept = {"kl": KL()} if loss.kl.in_reward else {}
    with quiet_traps():
        return loss.replace(**changes, **credit, **kept)


def folded(advantage: Tensor, weight: Tensor, unit: Tensor | float) -> Tensor:
    """A·w/unit, [N, T]: advantages that under the weight `unit` give what A gives under w; 0 where unit is."""
    unit = torch.as_tensor(unit, dtype=weight.dtype, device=weight.device)
    return advantage * torch.where(unit > 0, weight / torch.where(unit > 0, unit, 1.0), 0.0)


def objective(
    half: Loss, batch: Batch, normalizer: Normalizer | None = None, weight: Tensor | None = None
) -> LossOutput:
    """The objective on these rows.

    normalizer: counts over the whole update, so that rows add up to it. weight: 1/Z as the credit half made it, [N, T].
    """
    credit = half.credit(batch, normalizer)
    return half.objective(batch, credit if weight is None else dataclasses.replace(credit, weight=weight))

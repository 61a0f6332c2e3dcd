"""How far the sampler's stored log-probabilities are from the learner's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lossmith.detectors.measuring import BAND
from lossmith.losses import Batch, Credit
from lossmith.losses.loss import as_floats

__all__ = ["OF_SAMPLER", "against_sampler", "sampler_metrics"]

OF_SAMPLER = "of the sampler: "  # sums over tokens, which micro-batches add up before anything is divided


@torch.no_grad()
def against_sampler(logp: Tensor, batch: Batch, credit: Credit) -> dict[str, float]:
    """How far the sampler's stored log-probabilities are from the learner's, summed over the tokens.

    Both are of the distribution sampled from; what is left is rounding, and how far this update has already moved.
    """
    if batch.behavior_logp is None:
        return {}
    counts = batch.valid.double()  # 0 at masked positions, where gaps are 0 too: choosing the others would be a wait
    gap = torch.where(batch.valid, logp - batch.behavior_logp, 0.0).double()
    ratio = gap.clamp(-20, 20).exp()
    low, high = BAND
    sums = {
        "gap": gap.abs(), "outside": ((ratio < low) | (ratio > high)) * counts, "ratio": ratio * counts,
        "squared": ratio.square() * counts, "tokens": counts,
    }  # fmt: skip
    return as_floats({OF_SAMPLER + name: x.sum() for name, x in sums.items()})


def sampler_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sampler against learner: before the round's first update, where only rounding is between them, and what the
    sample is worth in the last, where the updates are too."""

    def of(update: Mapping[str, float], name: str) -> float:
        return update.get(OF_SAMPLER + name, 0.0)

    first, last = updates[0], updates[-1]
    if not of(first, "tokens") or not of(last, "squared"):
        return {}
    return {
        "sampler_gap": of(first, "gap") / of(first, "tokens"),
        "sampler_outside": of(first, "outside") / of(first, "tokens"),
        "ess": of(last, "ratio") ** 2 / (of(last, "tokens") * of(last, "squared")),
    }

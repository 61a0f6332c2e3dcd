"""How far the sampler's stored log-probabilities are from the learner's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lossmith.detectors.measuring import BAND
from lossmith.losses import Batch, Credit

__all__ = ["OF_SAMPLER", "against_sampler", "sampler_metrics"]

OF_SAMPLER = "of the sampler: "  # sums over tokens, which micro-batches add up before anything is divided


@torch.no_grad()
def against_sampler(logp: Tensor, batch: Batch, credit: Credit) -> dict[str, float]:
    """How far the sampler's stored log-probabilities are from the learner's, summed over the tokens.

    Both are of the distribution sampled from; what is left is rounding, and how far this update has already moved.
    """
    if batch.behavior_logp is None:
        return {}
    gap = (logp - batch.behavior_logp)[batch.valid].double()
    ratio = gap.clamp(-20, 20).exp()
    low, high = BAND
    sums = {
        "gap": gap.abs(), "outside": ((ratio < low) | (ratio > high)).double(), "ratio": ratio,
        "squared": ratio.square(), "tokens": torch.ones_like(ratio),
    }  # fmt: skip
    return {OF_SAMPLER + name: float(x.sum()) for name, x in sums.items()}


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

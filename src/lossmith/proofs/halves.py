"""Checks of what a loss says about its two halves: homogeneous in A, and which fields each half reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from lossmith.losses import Batch
from lossmith.losses.batch import FIELDS
from lossmith.proofs.finding import FAILED, PASSED, Finding, gap, judged, not_applicable
from lossmith.proofs.random_batches import Fields, gradients, make, random_fields

__all__ = ["beside", "homogeneous", "reads"]

FACTORS = (0.25, 8.0, 1024.0)  # powers of two: a product with them rounds nothing
DRIFTS = (0.3, 1.5)


def homogeneous(loss: Any, seed: int) -> Finding:
    """The policy term under the credit cA is c times that under A, where the loss says so; and is not, where not."""
    check = "homogeneous"
    said = getattr(loss, "homogeneous", None)
    if not isinstance(said, bool) or not hasattr(loss, "credit"):
        return not_applicable(check, "the loss does not say whether it is homogeneous in A")
    numbers = [_scaling_gap(loss, seed, drift, c) for drift in DRIFTS for c in FACTORS]
    if any(number is None for number in numbers):
        return not_applicable(check, "the loss has no policy term that an advantage multiplies")
    number = max(number for number in numbers if number is not None)
    if said:
        return judged(check, number, 1e-12, "policy term under cA against c times that under A")
    status = PASSED if number > 1e-9 else FAILED
    return Finding(check, status, number, "said not to be homogeneous in A: relative difference at its largest")


def _scaling_gap(loss: Any, seed: int, drift: float, factor: float) -> float | None:
    """Gap of value and gradient of the policy term under c times the credit; None where there is no such term."""
    found = []
    for c in (1.0, factor):
        leaves, batch = make(random_fields(loss, seed, drift))
        credit = loss.credit(batch)
        term = loss.objective(batch, dataclasses.replace(credit, advantage=c * credit.advantage)).terms.get("policy")
        if term is None:
            return None
        found.append((term.detach() * (factor / c), gradients(term, leaves)["logp"] * (factor / c)))
    (value, slope), (scaled, scaled_slope) = found
    # c times the term, divided by c again so that the floor of `gap` means the same at every c
    return max(gap(value / factor, scaled / factor), gap(slope / factor, scaled_slope / factor))


def beside(loss: Any, seed: int, drift: float = 0.3) -> Fields:
    """A random batch that also holds the reward, and the fields that the loss looks at where they are given."""
    fields = random_fields(loss, seed, drift)
    read = (loss.credit_reads | loss.objective_reads) & FIELDS.keys() | {"reward"}
    return {**random_fields(_Wanting(loss, read), seed, drift), **fields}


class _Wanting:
    """A loss with more needs, for drawing a batch."""

    def __init__(self, loss: Any, fields: frozenset[str]) -> None:
        self.name, self.needs = loss.name, (loss.needs & FIELDS.keys()) | fields


def reads(loss: Any, seed: int) -> Finding:
    """Each half gives the same where it sees nothing but the fields that it says it reads."""
    check = "reads"
    if not hasattr(loss, "credit_reads") or not hasattr(loss, "objective_reads"):
        return not_applicable(check, "the loss does not say which fields its halves read")
    fields = beside(loss, seed)
    # the reward is always there: it has the type of the batch
    allowed = ({"mask", "reward", *loss.credit_reads}, {"logp", "mask", *loss.objective_reads})
    found = []
    for first, second in ((fields.keys(), fields.keys()), allowed):
        leaves, batch = make({k: v for k, v in fields.items() if k in second})
        credit = loss.credit(Batch(**{k: v for k, v in fields.items() if k in first}))
        total = loss.objective(batch, credit).loss
        found.append((total.detach(), gradients(total, leaves)))
    (value, slopes), (same, same_slopes) = found
    nothing = {name: torch.zeros_like(slope) for name, slope in slopes.items()}  # of a leaf that was not shown
    number = max(gap(value, same), *(gap(slope, (nothing | same_slopes)[name]) for name, slope in slopes.items()))
    return judged(check, number, 1e-12, "each half with nothing but the fields that it says it reads")

"""The listing of a loss, run: what `code()` prints is the loss, not a text beside it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lossmith.losses import Batch, FunctionLoss
from lossmith.proofs.finding import Finding, gap, judged, not_applicable
from lossmith.proofs.random_batches import Fields, random_fields

__all__ = ["listing"]

# What a listing may read beyond the needs of its loss: an old policy that is given, a critic's old value.
BESIDE = ("old_logp", "behavior_logp")


def listing(loss: Any, seed: int) -> Finding:
    """Value and gradient of the generated plain torch against the loss's own."""
    check = "listing"
    if isinstance(loss, FunctionLoss):
        return not_applicable(check, "the loss is a function: its source is its listing")
    try:
        source = loss.code()
    except (AttributeError, NotImplementedError, TypeError):
        return not_applicable(check, "the loss has no listing")
    fields = at_the_left(random_fields(loss, seed), random_fields(loss, seed)["mask"])
    for name in BESIDE:
        fields.setdefault(name, fields["old_logp"])
    space: dict[str, Any] = {"torch": torch}
    exec(source, space)
    function = space[source.partition("(")[0].removeprefix("def ")]
    wanted = [name for name in inspect.signature(function).parameters if name not in ("logp", "mask")]

    def listed(logp: Tensor) -> Tensor:
        value: Tensor = function(logp, fields["mask"], **{name: fields[name] for name in wanted})
        return value

    def own(logp: Tensor) -> Tensor:
        value: Tensor = loss(Batch(**{**fields, "logp": logp})).loss
        return value

    (a, da), (b, db) = (_slope(f, fields["logp"]) for f in (listed, own))
    return judged(check, max(gap(a, b), gap(da, db)), 1e-9, "the listing against the loss, value and gradient")


def _slope(f: Any, logp: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logp.clone().requires_grad_()
    value = f(leaf)
    if not value.requires_grad:
        return value, torch.zeros_like(leaf)
    grad = torch.autograd.grad(value, leaf, allow_unused=True)[0]
    return value.detach(), torch.zeros_like(leaf) if grad is None else grad


def at_the_left(fields: Fields, mask: Tensor, drop: bool = True) -> Fields:
    """The same completions with their tokens at the left; those without a token are left out, or kept."""
    order, live = (~mask).to(torch.int8).argsort(dim=1, stable=True), mask.any(1) | (not drop)

    def moved(x: Tensor) -> Tensor:
        x = x.gather(1, order) if x.shape == mask.shape else x
        return x[live]

    compact = {name: moved(x) for name, x in fields.items()}
    there = compact["mask"]
    return {
        name: torch.where(there, x, torch.zeros_like(x)) if x.shape == there.shape and x.is_floating_point() else x
        for name, x in compact.items()
    }

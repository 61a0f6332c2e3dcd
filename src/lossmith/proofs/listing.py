"""The listing of a loss, run: what `code()` prints is the loss, not a text beside it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lossmith.losses import Batch, FunctionLoss
from lossmith.proofs.finding import Finding, gap, judged, not_applicable
from lossmith.proofs.random_batches import LEAVES, Fields, gradients, over_tokens, random_fields

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

    def listed(leaves: Fields) -> Tensor:
        given = fields | leaves
        value: Tensor = function(given["logp"], given["mask"], **{name: given[name] for name in wanted})
        return value

    def own(leaves: Fields) -> Tensor:
        value: Tensor = loss(Batch(**fields | leaves)).loss
        return value

    (a, da), (b, db) = (_slopes(f, fields) for f in (listed, own))
    number = max(gap(a, b), *(gap(da[name], db[name]) for name in da))
    return judged(check, number, 1e-9, "the listing against the loss, value and gradient")


def _slopes(f: Any, fields: Fields) -> tuple[Tensor, Fields]:
    """(value, gradient of every leaf)."""
    leaves = {name: fields[name].clone().requires_grad_() for name in LEAVES if name in fields}
    value = f(leaves)
    return value.detach(), gradients(value, leaves)


def at_the_left(fields: Fields, mask: Tensor, drop: bool = True) -> Fields:
    """The same completions with their tokens at the left; those without a token are left out, or kept."""
    order, live = (~mask).to(torch.int8).argsort(dim=1, stable=True), mask.any(1) | (not drop)

    def moved(x: Tensor) -> Tensor:
        of_tokens = x.shape[:2] == mask.shape
        x = x.gather(1, order.view(*order.shape, *[1] * (x.ndim - 2)).expand_as(x)) if of_tokens else x
        return x[live]

    compact = {name: moved(x) for name, x in fields.items()}
    there = compact["mask"]
    return {
        name: torch.where(over_tokens(there, x), x, 0.0) if x.is_floating_point() and x.ndim > 1 else x
        for name, x in compact.items()
    }

"""Checks of the layout: the same number however the batch is laid out, and nothing from slots that do not count."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lossmith.losses import Batch, Normalizer
from lossmith.proofs.finding import Finding, gap, judged, not_applicable
from lossmith.proofs.random_batches import (
    Evaluation,
    Fields,
    evaluate,
    gradients,
    make,
    over_tokens,
    random_fields,
    takes_normalizer,
)

__all__ = [
    "all_masked",
    "empty_rows",
    "group_labels",
    "masked_positions",
    "micro_batches",
    "padding",
    "ranks",
    "row_order",
    "single_precision",
]

ROUNDING = 1e-11  # float64 sums in another order
PARTITIONS = ([[8, 0, 3], [1], [2, 7, 6, 5, 4]], [[i] for i in range(9)], [[4], [0, 1, 2, 3], [5, 6, 7, 8]])


def difference(a: Evaluation, value: Tensor, grads: Fields) -> float:
    """Largest relative difference of the value and of every gradient; NaN if any is."""
    gaps = [gap(a.value, value), *(gap(a.gradients[leaf], grads[leaf]) for leaf in a.gradients)]
    return math.nan if any(math.isnan(x) for x in gaps) else max(gaps)


def masked_positions(loss: Any, seed: int) -> Finding:
    """NaN, infinity and large numbers at masked positions change nothing, and get no gradient: bit for bit."""
    fields = random_fields(loss, seed)
    clean = evaluate(loss, _filled(fields, 0.0, loss))
    leaks = 0
    for junk in (math.nan, math.inf, -math.inf, 1e30, -200.0):
        sick = evaluate(loss, _filled(fields, junk, loss))
        same = torch.equal(clean.value, sick.value)
        same &= all(torch.equal(clean.gradients[k], sick.gradients[k]) for k in clean.gradients)
        leaks += not same
    leaks += any(bool(grad[~fields["mask"]].any()) for grad in clean.gradients.values())
    leaks += not bool(torch.isfinite(clean.value))
    return judged("masked_positions", float(leaks), 0.0, "kinds of junk at masked positions that change something")


def _keeps_masked(loss: Any) -> bool:
    """Whether a completion without a token keeps its reward in the statistics."""
    return getattr(loss, "masked", "leave") == "keep"


def _filled(fields: Fields, value: float, loss: Any = None) -> Fields:
    """This number in every slot that must not count: masked tokens, and everything of rows without a token."""
    mask, sick = fields["mask"], dict(fields)
    for name, x in fields.items():
        if name == "reward" and _keeps_masked(loss):
            continue
        if x.is_floating_point():
            sick[name] = torch.where(over_tokens(mask, x), x, torch.full_like(x, value))
    return sick


def padding(loss: Any, seed: int) -> Finding:
    """More masked columns, left and right, change nothing."""
    fields = random_fields(loss, seed)
    before, (n, t) = evaluate(loss, fields), fields["mask"].shape
    wide = dict(fields)
    for name, x in fields.items():
        if x.shape[:2] == (n, t):
            size = (n, t + 5, *x.shape[2:])
            wide[name] = torch.full(size, False if x.dtype == torch.bool else -7, dtype=x.dtype)
            wide[name][:, 2 : 2 + t] = x
    after = evaluate(loss, wide)
    number = difference(before, after.value, {k: g[:, 2 : 2 + t] for k, g in after.gradients.items()})
    return judged("padding", number, ROUNDING, "with 5 more masked columns")


def row_order(loss: Any, seed: int) -> Finding:
    """Rows in another order: the same loss, and the gradients move with their rows."""
    fields, order = random_fields(loss, seed), torch.tensor([3, 8, 0, 5, 4, 7, 1, 6, 2])
    after = evaluate(loss, {k: v[order] for k, v in fields.items()})
    back = order.argsort()
    number = difference(evaluate(loss, fields), after.value, {k: g[back] for k, g in after.gradients.items()})
    return judged("row_order", number, ROUNDING, "with the rows in another order")


def group_labels(loss: Any, seed: int) -> Finding:
    """Prompts numbered otherwise: the same loss."""
    fields = random_fields(loss, seed)
    renamed = {5: 0, 2: 41, 9: 3, 7: 1_000_003}
    labels = torch.tensor([renamed[int(g)] for g in fields["group"]])
    after = evaluate(loss, fields | {"group": labels})
    number = difference(evaluate(loss, fields), after.value, after.gradients)
    return judged("group_labels", number, ROUNDING, "with the prompts numbered otherwise")


def micro_batches(loss: Any, seed: int) -> Finding:
    """Pieces of the batch under one credit of the whole add up to the whole, in several partitions."""
    check = "micro_batches"
    if not getattr(loss, "separable", True) or not hasattr(loss, "credit"):
        return not_applicable(check, "the loss is of the whole batch at once and must not be cut")
    fields, numbers = random_fields(loss, seed), []
    whole = evaluate(loss, fields)
    for partition in PARTITIONS:
        leaves, batch = make(fields)
        credit = loss.credit(batch)
        total = torch.zeros((), dtype=torch.float64)
        for piece in partition:
            rows = torch.tensor(piece)
            total = total + loss.objective(batch.rows(rows), credit.rows(rows)).loss
        numbers.append(difference(whole, total.detach(), gradients(total, leaves)))
    return judged(check, max(numbers, key=lambda x: (x != x, x)), ROUNDING, "pieces added up against the whole")


def ranks(loss: Any, seed: int) -> Finding:
    """Two ranks with whole prompts and a shared normalizer add up to one."""
    check = "ranks"
    if loss.coupling == "batch":
        return not_applicable(check, "statistics of the whole batch, which one rank cannot see")
    if not takes_normalizer(loss):
        return not_applicable(check, "the loss takes no normalizer from outside")
    fields = random_fields(loss, seed)
    group, whole = fields["group"], evaluate(loss, fields)
    halves = [(group == 5) | (group == 9), (group == 2) | (group == 7)]
    shares = [{k: v[half] for k, v in fields.items()} for half in halves]
    norm = _counts(loss, shares[0]) + _counts(loss, shares[1])
    total = torch.zeros((), dtype=torch.float64)
    grads = {k: torch.zeros_like(g) for k, g in whole.gradients.items()}
    for half, share in zip(halves, shares, strict=True):
        part = evaluate(loss, share, norm)
        total = total + part.value
        for leaf in grads:
            grads[leaf][half] = part.gradients[leaf]
    return judged(check, difference(whole, total, grads), ROUNDING, "two ranks added up against one")


def _counts(loss: Any, fields: Fields) -> Normalizer:
    """Counts of one rank's share, of what takes part."""
    batch = Batch(**fields)
    counts = getattr(loss, "counts", None)
    return counts(batch) if counts is not None else Normalizer.of(batch.valid, batch.group)


def single_precision(loss: Any, seed: int) -> Finding:
    """float32 gives what float64 gives, to float32's digits."""
    exact = evaluate(loss, random_fields(loss, seed))
    rough = evaluate(loss, random_fields(loss, seed, dtype=torch.float32))
    number = difference(exact, rough.value, rough.gradients)
    return judged("single_precision", number, 1e-3, "float32 against float64")


def all_masked(loss: Any, seed: int) -> Finding:
    """No valid token: loss 0 and gradient 0."""
    fields = random_fields(loss, seed)
    found = evaluate(loss, _filled(fields | {"mask": torch.zeros_like(fields["mask"])}, math.nan))
    number = max(float(found.value.abs()), *(float(g.abs().max()) for g in found.gradients.values()), 0.0)
    clean = bool(torch.isfinite(found.value)) and all(bool(torch.isfinite(g).all()) for g in found.gradients.values())
    return judged("all_masked", number if clean else math.nan, 0.0, "loss and gradient without a valid token")


def empty_rows(loss: Any, seed: int) -> Finding:
    """A completion without a token is no completion: leaving it out changes nothing, nor does its reward.

    Where its reward is meant to stay in the statistics: leaving it out changes nothing if it has none.
    """
    fields = random_fields(loss, seed)
    live = fields["mask"].any(1)
    if _keeps_masked(loss) and "reward" in fields:
        fields["reward"] = torch.where(live, fields["reward"], math.nan)
    before = evaluate(loss, fields)
    after = evaluate(loss, {k: v[live] for k, v in fields.items()})
    grads = {k: torch.zeros_like(g) for k, g in before.gradients.items()}
    for leaf, grad in after.gradients.items():
        grads[leaf][live] = grad
    return judged("empty_rows", difference(before, after.value, grads), ROUNDING, "without the rows that have no token")


def untouched(fields: Fields, batch: Batch) -> bool:
    """Whether the batch still holds these numbers at valid positions."""
    mask = fields["mask"]
    for name, x in fields.items():
        now = getattr(batch, name).detach()
        valid = mask if x.shape[:2] == mask.shape else mask.any(1)
        if not torch.equal(now[valid], x[valid]):
            return False
    return True

"""A loss driven through exactly what a hook sees: fields that do not reach it are not there, rows come in pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lossmith.adapters import rows
from lossmith.adapters.hooks import Hook
from lossmith.losses import Batch, Normalizer
from lossmith.losses.loss import Loss
from lossmith.proofs.halves import beside
from lossmith.proofs.random_batches import evaluate, gradients, make

PIECES = {  # of nine rows: shuffled, groups broken up
    "micro-batch": [[3, 0, 8], [1, 7], [2, 4, 6, 5]],
    "completion": [[i] for i in range(9)],
    "all": [list(range(9))],
}


def through(hook: Hook, loss: Loss, *, at_once: bool = False, seed: int = 0) -> float:
    """Largest difference of the gradient that comes through the hook from the whole batch's."""
    fields = beside(loss, seed)
    if hook.old_sampled:
        fields["behavior_logp"] = fields["old_logp"]
    want = evaluate(loss, fields).gradients
    leaves, batch = make(fields)
    given = _given(batch, hook.objective)
    read = sorted(hook.one_field & loss.needs)
    given |= dict.fromkeys(read, given.get(read[0])) if read else {}  # one tensor for all of them
    seen = Batch(logp=batch.logp, mask=batch.mask, **given)
    objective = _half(hook, loss, fields, batch)
    pieces = [torch.tensor(piece) for piece in PIECES["all" if at_once else hook.rows]]
    got = gradients(torch.stack([objective(seen.rows(piece), piece) for piece in pieces]).sum(), leaves)
    return max(float((got[name] - want[name]).abs().max()) for name in want)


def _given(batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
    return {name: x for name in names if (x := getattr(batch, name)) is not None}


def _shown(fields: dict, names: frozenset[str]) -> dict[str, Tensor]:
    """As the trainer has them: the reward of a completion that is masked too."""
    return {name: x for name, x in fields.items() if name in names | {"mask"}}


def _half(hook: Hook, loss: Loss, fields: dict, batch: Batch) -> Callable[[Batch, Tensor], Tensor]:
    """The objective of some rows, as far as the hook lets it know the batch."""
    if hook.carries == "credit":
        credit = loss.credit(Batch(**_shown(fields, hook.credit)))
        return lambda part, index: loss.objective(part, credit.rows(index)).loss
    if not hasattr(loss, "aggregate"):
        return lambda part, index: rows.objective(loss, part).loss
    tokens, norm = batch.tokens, Normalizer(batch.tokens, int(batch.live.sum()), 0)
    half, after = rows.objective_half(hook, loss), tokens if hook.weights == "tokens" else 1
    if hook.credit is None and hook.makes_own_credit(loss):
        return lambda part, index: rows.objective(half, part, norm).loss / after
    if hook.credit is None:  # the trainer's estimator is the loss's
        advantage, weight = rows.credit_of(loss, Batch(**{k: v for k, v in fields.items() if k != "logp"}))
    else:
        shown = Batch(**_shown(fields, hook.credit))
        advantage, weight = rows.credit_of(loss, shown)
        if hook.carries == "advantage":
            advantage = rows.advantages(hook, loss, shown, 1.0 if hook.weights == "scaled" else None)
    if hook.per_completion:
        first = batch.mask.to(torch.int8).argmax(1, keepdim=True)
        advantage = advantage.gather(1, first).expand(batch.mask.shape)

    def objective(part: Batch, index: Tensor) -> Tensor:
        part = part.replace(advantage=advantage[index])
        return rows.objective(half, part, norm, weight[index] if hook.carries == "weights" else None).loss / after

    return objective

"""How a round is cut: into optimizer steps, into the ranks' shares, and into passes through the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lossmith.losses import Batch
from lossmith.policy import Policy, sharing_is_exact
from lossmith.ranks import Ranks
from lossmith.rollouts import Rollout
from lossmith.training.recipe import Recipe

__all__ = ["micro_batches", "of_rank", "rows_of_updates", "uncompilable"]


def rows_of_updates(batch: Batch, recipe: Recipe, step: int) -> Iterator[Tensor]:
    """Rows of each optimizer step: whole groups, shuffled anew in every epoch by (seed, step, epoch)."""
    assert batch.group is not None
    groups = batch.group.cpu()
    ids = groups.unique()
    for epoch in range(recipe.epochs):
        rng = np.random.default_rng([recipe.seed, step, epoch])
        order = ids[torch.from_numpy(rng.permutation(len(ids)))]
        for chosen in order.tensor_split(min(recipe.updates_per_step, len(ids))):
            yield torch.isin(groups, chosen).nonzero()[:, 0]


def of_rank(rollouts: Sequence[Rollout], ranks: Ranks) -> list[int]:
    """The rows of this rank: whole groups, dealt out by turns."""
    ids = list(dict.fromkeys(r.prompt.id for r in rollouts))
    mine = set(ids[ranks.rank :: ranks.size])
    return [i for i, r in enumerate(rollouts) if r.prompt.id in mine]


def micro_batches(rollouts: Sequence[Rollout], rows: Sequence[int], tokens: int, shares: bool) -> Iterator[Tensor]:
    """Of these rows, the numbers in each pass of at most so many tokens, a prompt's completions side by side.

    shares: they share its encoding.
    """
    order = sorted(rows, key=lambda i: (rollouts[i].prompt.id, rollouts[i].sample))
    taken: list[int] = []
    seen: set[str] = set()
    used = 0
    for i in order:
        r = rollouts[i]
        shared = r.prompt.id in seen and shares
        cost = len(r.completion_ids) + (0 if shared else len(r.prompt_ids))
        # 25% over budget rather than encode the prompt again for its last few completions
        budget = tokens * (1.25 if shared else 1.0)
        if taken and used + cost > budget:
            yield torch.tensor(taken)
            taken, seen, used = [], set(), 0
            cost = len(r.completion_ids) + len(r.prompt_ids)
        taken.append(i)
        seen.add(r.prompt.id)
        used += cost
    if taken:
        yield torch.tensor(taken)


def uncompilable(policy: Policy, *, recompute: bool, sharded: bool) -> str:
    """Why a policy's layers cannot be compiled, if they cannot."""
    if sharded:
        return "ranks hold the weights in parts"
    if policy.adapter is not None and policy.adapter.quantized:
        return "bitsandbytes computes with weights in 4 bits by itself"
    if recompute:
        return "layers are run again in the backward pass"
    return "" if sharing_is_exact(policy) else "the model's layers are not known"

"""How the weight of a completion depends on its length, measured: dL/dlogp of completions of 1 to T tokens with equal
advantages in one batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.losses.batch import FIELDS
from lossmith.proofs.random_batches import batch_fields, gradients, make
from lossmith.proofs.scenarios import without_kl

__all__ = ["LengthWeights", "length_weights", "neutral_fields"]

LONGEST = 8


@dataclass(frozen=True)
class LengthWeights:
    """lengths 1..T; token: mean |dL/dlogp| of a token of each completion; completion: their sum over the completion.

    exponent a: the weight of a token is proportional to T^a, fitted on a log-log scale; misfit: the largest error of
    that fit in log units (0: a power law exactly).
    """

    lengths: tuple[int, ...]
    token: tuple[float, ...]
    completion: tuple[float, ...]
    exponent: float
    misfit: float

    @property
    def statement(self) -> str:
        """One sentence."""
        if self.misfit > 0.02:
            return "the weight of a token is no power of its completion's length"
        a = round(self.exponent, 3) + 0.0
        if a == 0:
            return "every token weighs the same, a completion as much as it has tokens"
        if a == -1:
            return "every completion weighs the same; a token of a long one weighs less (1/T)"
        return f"the weight of a token is proportional to T^{a:g}, of a completion to T^{a + 1:g}"


def length_weights(loss: Any) -> LengthWeights | None:
    """None where the loss takes no advantage from outside, or gives those completions no weight."""
    loss = without_kl(loss)  # an advantage that is given leaves no reward to take a penalty from
    lengths = torch.arange(1, LONGEST + 1)
    mask = torch.arange(LONGEST) < lengths[:, None]
    fields = neutral_fields(loss, mask) | {"advantage": torch.ones(LONGEST, dtype=torch.float64)}
    if "reward" in fields:  # not all equal: a filter would leave such a prompt out
        fields["reward"] = torch.arange(LONGEST, dtype=torch.float64)
    leaves, batch = make(fields)
    try:
        output = loss(batch)
    except ValueError:  # LossError: it takes no advantage
        return None
    value = output.terms.get("policy")
    if value is None or not isinstance(output.advantage, Tensor):
        return None
    size = gradients(value, leaves)["logp"].abs()
    total, per_token = size.sum(1), size.sum(1) / lengths
    if not bool((per_token > 0).all()):
        return None
    x, y = lengths.double().log(), per_token.log()
    exponent = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    misfit = float((y - y.mean() - exponent * (x - x.mean())).abs().max())
    return LengthWeights(tuple(lengths.tolist()), tuple(per_token.tolist()), tuple(total.tolist()), exponent, misfit)


def neutral_fields(loss: Any, mask: Tensor) -> dict[str, Tensor]:
    """A batch in which nothing but rewards and lengths differ: one prompt, all policies equal, values and KL zero."""
    size = {"N": mask.shape[0], "T": mask.shape[1], "K": 2, "V": 2}
    usual = {"logp": math.log(0.5), "share": 0.5, "flag": False, "whole": 0}  # of a kind; anything else is 0
    own = {"entropy": math.log(2), "pair_probability": 1.0, "pair_weight": 1.0}

    def neutral(name: str) -> Tensor:
        field = FIELDS[name]
        value = own.get(name, usual.get(field.kind, 0.0))
        shape = [size[letter] for letter in field.shapes[0]]
        return torch.full(shape, value, dtype=torch.float64 if isinstance(value, float) else None)

    return {name: mask if name == "mask" else neutral(name) for name in batch_fields(loss) | {"group"}}

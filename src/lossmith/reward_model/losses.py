"""Losses of scores: what a reward model is trained with. Pure functions of tensors.

Equation numbers follow NLPBook ch. 10. Its (4.62), (4.63) and (4.70) print a minus in front of a square that is to be
minimized, and its (4.57) sums both orders of a pair: taken literally the first three have no lower bound, and the last
is best where all scores are equal. Here the squares are added, and only y_a ≻ y_b counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["all_pairs", "bradley_terry", "centring", "hinge", "logistic", "mean_squared", "plackett_luce"]


def bradley_terry(
    chosen: Tensor, rejected: Tensor, probability: Tensor | float = 1.0, margin: Tensor | float = 0.0
) -> Tensor:
    """-[p ln σ(d) + (1 - p) ln σ(-d)], d = r_a - r_b - margin, for each pair [P] (4.35, 4.36; soft labels 2.20).

    probability: that the chosen one is better; 0.5 is a tie, whose best d is 0. margin: how much better it is at least.
    """
    d = chosen - rejected - margin
    return -(probability * logsigmoid(d) + (1 - probability) * logsigmoid(-d))


def plackett_luce(scores: Tensor, tiers: Sequence[int]) -> Tensor:
    """-log Pr(Y°|x): one ranking's scores [N], and the tier of each, 0 the best (4.59 to 4.61).

    Each output in turn is drawn from those not better than it: Σ_i [log Σ_{j: tier_j ≥ tier_i} e^{r_j} - r_i] (ties by
    Breslow's rule: those of a tier are drawn from the same ones). The last output has nothing left to beat, and adds 0.
    """
    of = torch.as_tensor(tiers, device=scores.device)
    rest = of[None, :] >= of[:, None]  # [i, j]: j is still there when i is drawn
    remaining = scores[None, :].expand(len(scores), -1).masked_fill(~rest, -torch.inf).logsumexp(1)
    return (remaining - scores).sum()


def all_pairs(scores: Tensor, tiers: Sequence[int]) -> Tensor:
    """The mean of -ln σ(r_a - r_b) over the pairs of one ranking in which a stands above b (4.57, one order only)."""
    of = torch.as_tensor(tiers, device=scores.device)
    better, worse = (of[:, None] < of[None, :]).nonzero(as_tuple=True)
    return -logsigmoid(scores[better] - scores[worse]).mean() if len(better) else scores.sum() * 0.0


def mean_squared(scores: Tensor, ratings: Tensor) -> Tensor:
    """(φ - r)² of each rated output [N] (4.62 and 4.70, with the sign that is meant)."""
    return (ratings - scores) ** 2


def logistic(scores: Tensor, good: Tensor) -> Tensor:
    """-ln σ(r) of good outputs and -ln σ(-r) of the others [N]."""
    return -logsigmoid(torch.where(good, scores, -scores))


def hinge(scores: Tensor, sign: Tensor) -> Tensor:
    """max(0, 1 - r·r̂) of segments rated r̂ = +1 or -1 [N] (4.71)."""
    return (1 - scores * sign).clamp(min=0)


def centring(scores: Tensor) -> Tensor:
    """(2·mean r)² over the outputs of one comparison: (r_a + r_b)² of a pair (4.63, with the sign that is meant).

    Differences do not say where zero is; this puts it in the middle of what was compared (arXiv:2312.09244).
    """
    return (2 * scores.mean()) ** 2

"""A token's gradient taken apart: the numbers that multiply and add up to -dL/dlogp, each with a word for it.

A loss says this of itself (`Loss.anatomy`): by its formulas where it states them, measured by autograd where not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Anatomy", "Link", "Pull", "measured"]


@dataclass(frozen=True, eq=False)
class Link:
    """One number of each token."""

    name: str
    value: Tensor  # [N, T]
    words: str = ""  # what it is: a formula, or everyday words


@dataclass(frozen=True, eq=False)
class Pull:
    """What one term of the loss does to each token: a part of -dL/dlogp, above 0 where a step makes it more likely."""

    name: str  # as in LossOutput.terms
    factors: tuple[Link, ...]  # each token's own number is their product
    mask: Tensor  # [N, T] bool
    share: Tensor | None = None  # [N, T], where a completion's tokens add up theirs: what part each gets of the sum
    measured: bool = False  # by autograd: the loss states no formula of it

    @property
    def own(self) -> Tensor:
        """[N, T], the product of the factors."""
        return math.prod((link.value for link in self.factors[1:]), start=self.factors[0].value)

    @property
    def value(self) -> Tensor:
        """[N, T], 0 at masked positions: the product; or the completion's sum of them times the token's share."""
        own = torch.where(self.mask, self.own, 0.0)
        return own if self.share is None else torch.where(self.mask, own.sum(1, keepdim=True) * self.share, 0.0)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """All of it for a batch. Where a number is one of a completion, its tokens share it."""

    credit: tuple[Link, ...]  # from the score to the advantage, in this order
    ratio: tuple[Link, ...]  # how far the policy moved, and what the trust region makes of it
    pulls: tuple[Pull, ...]  # they add up to -dL/dlogp


def measured(terms: Mapping[str, Tensor], logp: Tensor, mask: Tensor) -> tuple[Pull, ...]:
    """The pulls of a loss's terms by autograd. logp [N, T] is the leaf that they were computed from."""
    found = []
    for name, term in terms.items():
        grad = torch.autograd.grad(term, logp, allow_unused=True, retain_graph=True)[0] if term.requires_grad else None
        value = torch.zeros_like(logp) if grad is None else -grad
        found.append(Pull(name, (Link("measured", value.detach(), "by autograd"),), mask, measured=True))
    return tuple(found)

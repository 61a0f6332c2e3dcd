"""What a trust region sees, and what it has to say: the per-token policy term ℓ and its weight w in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.batch import Batch
from lossmith.losses.piece import Piece

__all__ = ["Tokens", "Trust"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Response tokens as a trust region sees them, [N, T]; ratio and logp carry the gradient.

    A ratio of whole completions, and the advantage that goes with it, may be [N, 1].
    """

    ratio: Tensor  # r at the loss's ratio level
    advantage: Tensor  # A, detached
    logp: Tensor  # log π_θ
    denominator_logp: Tensor  # log-probability under the ratio's denominator (π_old, as a rule), detached
    mask: Tensor  # bool
    batch: Batch | None = None  # the rows they come from; None for single hypothetical tokens

    @classmethod
    def single(cls, ratio: Tensor, advantage: Tensor, old_prob: float) -> Tokens:
        """Completions of one token each, whose probability was old_prob and is now old_prob times ratio."""
        ratio, advantage = (x.reshape(-1, 1) for x in torch.broadcast_tensors(ratio, advantage))
        old = torch.full_like(ratio, old_prob).log()
        return cls(ratio, advantage, old + ratio.log(), old, torch.ones_like(ratio, dtype=torch.bool))

    def detach(self) -> Tokens:
        """The same numbers without gradient."""
        return Tokens(
            self.ratio.detach(), self.advantage, self.logp.detach(), self.denominator_logp, self.mask, self.batch
        )

    def on_policy(self) -> Tokens:
        """The same tokens where the policy is the old one still."""
        ratio = torch.ones_like(self.ratio)
        return Tokens(ratio, self.advantage, self.denominator_logp, self.denominator_logp, self.mask, self.batch)

    @property
    def delta(self) -> Tensor:
        """Log-ratio of each token, 0 at masked positions."""
        return self.logp - self.denominator_logp

    @property
    def lengths(self) -> Tensor:
        """[N, 1] valid tokens of each completion, at least 1."""
        return self.mask.sum(1, keepdim=True).clamp(min=1)


class Trust(Piece):
    """ℓ [N, T] from ratio, advantage and log-probability. Finite where r = 1, A = 0 and logp = 0, as masked tokens are.

    `value` is written as the paper prints it; `weight` is derived by hand: w = -(dℓ/d log r)/A where the gradient runs
    through the ratio, -(dℓ/d logp)/A where it runs through the log-probability. Neither calls the other, and they share
    nothing that decides a sign, a side or which tokens are kept: proofs hold one against autograd of the other, and a
    mistake in either alone shows there.

    At A = 0 the weight is its limit from above (A -> 0+); at a bound it is that of the unclipped branch.
    """

    through: ClassVar[str] = "ratio"  # what carries the gradient of ℓ: "ratio" or "logp"
    uses_ratio: ClassVar[bool] = True  # whether the denominator of the ratio changes anything
    token_only: ClassVar[bool] = False  # defined for ratios of single tokens
    acts_alone: ClassVar[bool] = False  # ℓ holds a part that acts where A is 0
    spreads: ClassVar[bool] = False  # `spread` adds up a completion's slopes and hands each token a part
    homogeneous: ClassVar[bool] = True  # ℓ(cA) = c·ℓ(A) for c > 0, so that a factor may be in A before or come after

    def value(self, at: Tokens) -> Tensor:
        """ℓ [N, T], with gradient."""
        raise NotImplementedError

    def weight(self, at: Tokens) -> Tensor:
        """w [N, T] in closed form."""
        raise NotImplementedError

    def slope(self, at: Tokens) -> Tensor:
        """dℓ/d log r, or dℓ/d logp, [N, T] in closed form: -w·A where ℓ is proportional to A."""
        return -self.weight(at) * at.advantage

    def factors(self, at: Tokens) -> list[tuple[str, Tensor, str]]:
        """(name, number, formula) of what -slope is the product of: A and w, as a rule."""
        weight, slope = self.weight(at), self.slope(at)
        if torch.equal(-weight * at.advantage, slope):
            return [("advantage", at.advantage, "A"), ("trust weight", weight, "w = −(dℓ/dlogp)/A")]
        return [("slope", -slope, f"of {self.formula()}")]

    def bounds(self, at: Tokens) -> tuple[Tensor | float, Tensor | float] | None:
        """The smallest and the largest ratio that count in full for one sign of A at least; None: it has none."""
        return None

    def spread(self, slope: Tensor, at: Tokens) -> Tensor:
        """Weighted slopes of ℓ [N, T] -> gradient for each token [N, T], where a token's ℓ depends on other tokens."""
        return slope

    def trap(self) -> str | None:
        """Why this setting misleads, if it does."""
        return None

    def formula(self) -> str:
        """-ℓ, the utility of a token."""
        raise NotImplementedError

    def code(self) -> list[str]:
        """Lines of plain torch that compute `loss` [N, T] from logp, r, A and denominator_logp."""
        raise NotImplementedError

"""Trust region: the per-token policy term ℓ, and its weight w(r, A) = -(dℓ/dlogp)/A in closed form.

`value` is written as the paper prints it; `weight` is derived by hand. A test holds one against autograd of the other.
At A = 0 the weight is its limit from above (A -> 0+). At a bound the gradient is that of the unclipped branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.errors import LossError
from lossmith.losses.piece import Piece, number, options, param

__all__ = ["TRUST", "BookClip", "Clip", "LogP", "NoTrust", "SgClip", "Truncate", "Trust"]


class Trust(Piece):
    """ℓ [N, T] from r, A and logp (all [N, T]; A carries no gradient)."""

    uses_ratio: ClassVar[bool] = True

    def value(self, ratio: Tensor, advantage: Tensor, logp: Tensor) -> Tensor:
        raise NotImplementedError

    def weight(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """w(r, A), shape broadcast from both."""
        raise NotImplementedError

    def trap(self) -> str | None:
        """Why this setting misleads, if it does."""
        return None

    def formula(self) -> tuple[str, str]:
        """(text, LaTeX) of -ℓ, the utility of a token."""
        raise NotImplementedError


@dataclass(frozen=True)
class LogP(Trust):
    """ℓ = -A·logp: REINFORCE (book eq. 4.43; Williams 1992)."""

    option: ClassVar[str] = "logp"
    uses_ratio: ClassVar[bool] = False

    def value(self, ratio: Tensor, advantage: Tensor, logp: Tensor) -> Tensor:
        return -advantage * logp

    def weight(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return torch.ones_like(ratio * advantage)

    def formula(self) -> tuple[str, str]:
        return "A·log π_θ(y_t)", r"A \log \pi_\theta(y_t)"


@dataclass(frozen=True)
class NoTrust(Trust):
    """ℓ = -A·r: importance sampling without a bound (book eq. 4.45)."""

    option: ClassVar[str] = "none"

    def value(self, ratio: Tensor, advantage: Tensor, logp: Tensor) -> Tensor:
        return -advantage * ratio

    def weight(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return ratio * torch.ones_like(advantage)

    def formula(self) -> tuple[str, str]:
        return "r·A", "r A"


@dataclass(frozen=True)
class Clip(Trust):
    """ℓ = -min(r·A, clip(r, 1 - low, 1 + high)·A) (PPO, arXiv:1707.06347, eq. 7).

    With `dual` and A < 0: never more than -dual·A (dual-clip PPO, arXiv:1912.09729, eq. 5).
    """

    option: ClassVar[str] = "clip"
    low: float = param("clip_low", 0.2, "how far below 1 the ratio still counts when A < 0", low=0)
    high: float = param("clip_high", 0.2, "how far above 1 the ratio still counts when A > 0", low=0)
    dual: float | None = param("dual_clip", None, "bound on the ratio when A < 0; none if not given", above=1)

    def _clipped(self, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """(where the bound holds, the bound)."""
        above = (advantage >= 0) & (ratio > 1 + self.high)
        below = (advantage < 0) & (ratio < 1 - self.low)
        # full_like, not Python numbers: where() would make those float32 and lose digits in float64
        bound = torch.where(above, torch.full_like(ratio, 1 + self.high), torch.full_like(ratio, 1 - self.low))
        clipped = above | below
        if self.dual is not None:
            far = (advantage < 0) & (ratio > self.dual)
            bound, clipped = torch.where(far, torch.full_like(ratio, self.dual), bound), clipped | far
        return clipped, bound

    def value(self, ratio: Tensor, advantage: Tensor, logp: Tensor) -> Tensor:
        clipped, bound = self._clipped(ratio.detach(), advantage)
        return -advantage * torch.where(clipped, bound, ratio)

    def weight(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        ratio, advantage = torch.broadcast_tensors(ratio, advantage)
        return torch.where(self._clipped(ratio, advantage)[0], torch.zeros_like(ratio), ratio)

    def formula(self) -> tuple[str, str]:
        lo, hi = number(max(1 - self.low, 0)), number(1 + self.high)
        text, tex = f"min(r·A, clip(r, {lo}, {hi})·A)", rf"\min(rA, \operatorname{{clip}}(r, {lo}, {hi})A)"
        if self.dual is not None:
            d = number(self.dual)
            text = f"[A<0: max({text}, {d}·A); else {text}]"
            tex = rf"\begin{{cases}}\max({tex}, {d}A) & A<0\\ {tex} & A\ge 0\end{{cases}}"
        return text, tex


@dataclass(frozen=True)
class BookClip(Trust):
    """ℓ = -A·min(r, 1 + high): the book's eq. 4.50 as printed, a demonstration.

    The minimum is taken before the product with A, so the lower bound never binds, and a worsening action
    (A < 0, r > 1 + high) gets no gradient. The same as PPO's clip only where A >= 0.
    """

    option: ClassVar[str] = "book_clip"
    high: float = param("clip_high", 0.2, "how far above 1 the ratio still counts, whatever the sign of A", low=0)

    def value(self, ratio: Tensor, advantage: Tensor, logp: Tensor) -> Tensor:
        return -advantage * ratio.clamp(max=1 + self.high)

    def weight(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        kept = torch.where(ratio <= 1 + self.high, ratio, torch.zeros_like(ratio))
        return kept * torch.ones_like(advantage)

    def trap(self) -> str | None:
        return (
            "the book's clip (eq. 4.50 as printed) gives no gradient to a worsening action (A < 0, r > "
            f"{number(1 + self.high)}) and never binds below; it is a demonstration, use trust='clip' (PPO) to train"
        )

    def formula(self) -> tuple[str, str]:
        return f"min(r, {number(1 + self.high)})·A", rf"\min(r, {number(1 + self.high)})A"


@dataclass(frozen=True)
class SgClip(Trust):
    """ℓ = -sg(clip(r, 1 - low, cap))·A·logp (CISPO, arXiv:2506.13585, eq. 4; cap from arXiv:2510.13786)."""

    option: ClassVar[str] = "sg_clip"
    low: float = param("clip_low", 1.0, "1 - clip_low is the smallest weight; 1 means no lower bound", low=0)
    cap: float = param("cap", 5.0, "the largest weight", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cap < 1 - self.low:
            raise LossError(f"sg_clip: cap={self.cap} lies below the lower bound 1 - clip_low = {1 - self.low}.")

    def value(self, ratio: Tensor, advantage: Tensor, logp: Tensor) -> Tensor:
        return -self.weight(ratio.detach(), advantage) * advantage * logp

    def weight(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return ratio.clamp(max(1 - self.low, 0.0), self.cap) * torch.ones_like(advantage)

    def trap(self) -> str | None:
        if self.cap < 1:
            return f"a stop-gradient cap of {number(self.cap)} < 1 scales down even on-policy tokens (ratio 1)"
        if self.low == 0:
            return "clip_low=0 raises every ratio below 1 to weight 1, so an action already left behind is pushed on"
        return None

    def formula(self) -> tuple[str, str]:
        lo, cap = number(max(1 - self.low, 0)), number(self.cap)
        if self.low >= 1:
            weight = ("r", "r") if self.cap == math.inf else (f"min(r, {cap})", rf"\min(r, {cap})")
        else:
            weight = (f"clip(r, {lo}, {cap})", rf"\operatorname{{clip}}(r, {lo}, {cap})")
        return (
            f"sg({weight[0]})·A·log π_θ(y_t)",
            rf"\operatorname{{sg}}\!\left({weight[1]}\right) A \log\pi_\theta(y_t)",
        )


@dataclass(frozen=True)
class Truncate(Trust):
    """ℓ = -sg(min(r, cap))·A·logp: truncated importance sampling as a policy gradient."""

    option: ClassVar[str] = "truncate"
    cap: float = param("cap", 1.0, "the largest weight", above=0)

    def value(self, ratio: Tensor, advantage: Tensor, logp: Tensor) -> Tensor:
        return SgClip(1.0, self.cap).value(ratio, advantage, logp)

    def weight(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return SgClip(1.0, self.cap).weight(ratio, advantage)

    def trap(self) -> str | None:
        return SgClip(1.0, self.cap).trap()

    def formula(self) -> tuple[str, str]:
        return SgClip(1.0, self.cap).formula()


TRUST = options(LogP, NoTrust, Clip, BookClip, SgClip, Truncate)

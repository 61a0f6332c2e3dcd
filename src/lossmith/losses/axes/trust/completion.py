"""One number a completion, from token ratios that are bounded one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.ratio import LOG_RATIO_BOUND, bounded_exp
from lossmith.losses.axes.trust.base import Tokens, Trust
from lossmith.losses.piece import number, param

__all__ = ["LogClip"]


@dataclass(frozen=True)
class LogClip(Trust):
    """ℓ = -A·exp(mean_t c_t) at each token, c = min(Δ, high) if A > 0, else max(Δ, -low) (GMPO, arXiv:2507.20673).

    The geometric mean of token ratios that are clipped in log space, one number a completion.
    """

    option: ClassVar[str] = "log_clip"
    through: ClassVar[str] = "logp"
    spreads: ClassVar[bool] = True
    token_only: ClassVar[bool] = True
    low: float = param("clip_low", 0.4, "smallest log-ratio that counts is -clip_low, for A < 0", low=0, bound=True)
    high: float = param("clip_high", 0.4, "largest log-ratio that counts, for A > 0", low=0, bound=True)

    def value(self, at: Tokens) -> Tensor:
        clipped = torch.where(at.advantage >= 0, at.delta.clamp(max=self.high), at.delta.clamp(min=-self.low))
        mean = torch.where(at.mask, clipped, torch.zeros_like(clipped)).sum(1, keepdim=True) / at.lengths
        return -at.advantage * bounded_exp(mean)

    def slope(self, at: Tokens) -> Tensor:
        """dℓ/d(mean c): what `spread` hands to the tokens that are not clipped."""
        return -at.advantage * self._level(at)

    def _beyond(self, at: Tokens) -> Tensor:
        """[N, T] bool, by hand: where a bound holds."""
        return torch.where(at.advantage < 0, at.delta < -self.low, at.delta > self.high)

    def _level(self, at: Tokens) -> Tensor:
        """exp(mean_t c_t) by hand, [N, 1]: the bound where it holds, the log-ratio elsewhere."""
        bound = torch.where(at.advantage < 0, torch.full_like(at.delta, -self.low), self.high)
        held = torch.where(self._beyond(at), bound, at.delta)
        return bounded_exp(torch.where(at.mask, held, torch.zeros_like(held)).sum(1, keepdim=True) / at.lengths)

    def weight(self, at: Tokens) -> Tensor:
        return self._level(at) / at.lengths * self._free(at)

    def factors(self, at: Tokens) -> list[tuple[str, Tensor, str]]:
        mean = self._level(at).expand_as(at.mask)
        return [("advantage", at.advantage, "A"), ("trust weight", mean, "exp(mean_t c_t)")]

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return math.exp(-self.low), math.exp(min(self.high, LOG_RATIO_BOUND))

    def _free(self, at: Tokens) -> Tensor:
        return (at.mask & ~self._beyond(at)).to(at.ratio.dtype)

    def spread(self, slope: Tensor, at: Tokens) -> Tensor:
        total = torch.where(at.mask, slope, torch.zeros_like(slope)).sum(1, keepdim=True)
        return total / at.lengths * self._free(at)

    def formula(self) -> str:
        return (
            f"A·exp(mean_t(c)) where c = min(log r, {number(self.high)}) if A ≥ 0 else max(log r, −{number(self.low)})"
        )

    def code(self) -> list[str]:
        return [
            "delta = logp - denominator_logp",
            f"c = torch.where(A >= 0, delta.clamp(max={self.high}), delta.clamp(min=-{self.low}))",
            "loss = -A * torch.exp((c * mask).sum(1, keepdim=True) / T[:, None])",
        ]

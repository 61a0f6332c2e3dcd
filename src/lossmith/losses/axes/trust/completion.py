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

    def _log_mean(self, at: Tokens, delta: Tensor) -> Tensor:
        """mean_t c_t, [N, 1]."""
        clipped = torch.where(at.advantage >= 0, delta.clamp(max=self.high), delta.clamp(min=-self.low))
        return torch.where(at.mask, clipped, torch.zeros_like(clipped)).sum(1, keepdim=True) / at.lengths

    def value(self, at: Tokens) -> Tensor:
        return -at.advantage * bounded_exp(self._log_mean(at, at.delta))

    def slope(self, at: Tokens) -> Tensor:
        """dℓ/d(mean c): what `spread` hands to the tokens that are not clipped."""
        return self.value(at)

    def weight(self, at: Tokens) -> Tensor:
        return bounded_exp(self._log_mean(at, at.delta)) / at.lengths * self._free(at)

    def factors(self, at: Tokens) -> list[tuple[str, Tensor, str]]:
        mean = bounded_exp(self._log_mean(at, at.delta)).expand_as(at.mask)
        return [("advantage", at.advantage, "A"), ("trust weight", mean, "exp(mean_t c_t)")]

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return math.exp(-self.low), math.exp(min(self.high, LOG_RATIO_BOUND))

    def _free(self, at: Tokens) -> Tensor:
        free = torch.where(at.advantage >= 0, at.delta <= self.high, at.delta >= -self.low)
        return (free & at.mask).to(at.ratio.dtype)

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

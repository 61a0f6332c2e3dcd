"""Weights that bend instead of stopping: the log-probability times a detached weight, and smooth ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.errors import LossError
from lossmith.losses.axes.trust.base import Tokens, Trust
from lossmith.losses.piece import number, param, symbol

__all__ = ["Band", "Gamma", "LogP", "NoTrust", "Quadratic", "ScaledLogP", "SgClip", "Sigmoid", "Taper", "Truncate"]


@dataclass(frozen=True)
class LogP(Trust):
    """ℓ = -A·logp: REINFORCE (book eq. 4.43; Williams 1992)."""

    option: ClassVar[str] = "logp"
    through: ClassVar[str] = "logp"
    uses_ratio: ClassVar[bool] = False

    def value(self, at: Tokens) -> Tensor:
        return -at.advantage * at.logp

    def weight(self, at: Tokens) -> Tensor:
        return torch.ones_like(at.ratio)

    def formula(self) -> str:
        return "A·log π_θ(y_t)"

    def code(self) -> list[str]:
        return ["loss = -A * logp"]


@dataclass(frozen=True)
class ScaledLogP(Trust):
    """ℓ = -A·logp/(1 + tau): online policy mirror descent as Trinity writes it (arXiv:2501.12599)."""

    option: ClassVar[str] = "scaled_logp"
    through: ClassVar[str] = "logp"
    uses_ratio: ClassVar[bool] = False
    tau: float | None = param("tau", None, "regularization towards the old policy", low=0, required=True)

    def value(self, at: Tokens) -> Tensor:
        return -at.advantage * at.logp / (1 + self.given("tau"))

    def weight(self, at: Tokens) -> Tensor:
        return torch.full_like(at.ratio, 1 / (1 + self.given("tau")))

    def formula(self) -> str:
        return f"A·log π_θ(y_t)/(1 + {symbol(self.tau, 'τ')})"

    def code(self) -> list[str]:
        return [f"loss = -A * logp / (1 + {self.tau})"]


@dataclass(frozen=True)
class NoTrust(Trust):
    """ℓ = -A·r: importance sampling without a bound (book eq. 4.45)."""

    option: ClassVar[str] = "none"

    def value(self, at: Tokens) -> Tensor:
        return -at.advantage * at.ratio

    def weight(self, at: Tokens) -> Tensor:
        return at.ratio

    def formula(self) -> str:
        return "r·A"

    def code(self) -> list[str]:
        return ["loss = -r * A"]


class _Weighted(Trust):
    """ℓ = -sg(w)·A·logp."""

    through: ClassVar[str] = "logp"
    stops_gradient: ClassVar[bool] = True

    def value(self, at: Tokens) -> Tensor:
        return -self.printed(at.detach()) * at.advantage * at.logp

    def printed(self, at: Tokens) -> Tensor:
        """The w of -sg(w)·A·logp as the paper prints it, [N, T]; `weight` is the same by hand."""
        raise NotImplementedError

    def weight_formula(self) -> str:
        """w, and what it is made of."""
        raise NotImplementedError

    def formula(self) -> str:
        weight, *where = self.weight_formula().split(" where ")
        return " where ".join([f"sg({weight})·A·log π_θ(y_t)", *where])

    def weight_code(self) -> list[str]:
        """Lines of plain torch that compute w from r, without gradient."""
        raise NotImplementedError

    def code(self) -> list[str]:
        return [*self.weight_code(), "loss = -w.detach() * A * logp"]


@dataclass(frozen=True)
class SgClip(_Weighted):
    """ℓ = -sg(clip(r, 1 - low, cap))·A·logp (CISPO, arXiv:2506.13585, eq. 4; cap from arXiv:2510.13786)."""

    option: ClassVar[str] = "sg_clip"
    low: float = param(
        "clip_low", 1.0, "1 - clip_low is the smallest weight; 1 means no lower bound", low=0, bound=True
    )
    cap: float = param("cap", 5.0, "the largest weight", above=0, bound=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cap < 1 - self.low:
            raise LossError(f"sg_clip: cap={self.cap} lies below the lower bound 1 - clip_low = {1 - self.low}.")

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return max(1 - self.low, 0.0), self.cap

    def printed(self, at: Tokens) -> Tensor:
        return at.ratio.clamp(max(1 - self.low, 0.0), self.cap)

    def weight(self, at: Tokens) -> Tensor:
        ratio, low = at.ratio, 1 - self.low
        raised = torch.where(ratio < low, torch.full_like(ratio, low), ratio)
        return torch.where(ratio > self.cap, torch.full_like(ratio, self.cap), raised)

    def trap(self) -> str | None:
        if self.cap < 1:
            return f"a stop-gradient cap of {number(self.cap)} < 1 scales down even on-policy tokens (ratio 1)"
        if self.low == 0:
            return "clip_low=0 raises every ratio below 1 to weight 1, so an action already left behind is pushed on"
        return None

    def weight_formula(self) -> str:
        if self.low < 1:
            return f"clip(r, {number(1 - self.low)}, {number(self.cap)})"
        return "r" if self.cap == math.inf else f"min(r, {number(self.cap)})"

    def weight_code(self) -> list[str]:
        cap = "" if self.cap == math.inf else f", max={self.cap}"
        return [f"w = r.clamp(min={max(1 - self.low, 0.0)}{cap})"]


@dataclass(frozen=True)
class Truncate(_Weighted):
    """ℓ = -sg(min(r, cap))·A·logp: truncated importance sampling as a policy gradient."""

    option: ClassVar[str] = "truncate"
    cap: float = param("cap", 1.0, "the largest weight", above=0, bound=True)

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return 0.0, self.cap

    def printed(self, at: Tokens) -> Tensor:
        return at.ratio.clamp(max=self.cap)

    def weight(self, at: Tokens) -> Tensor:
        return torch.where(at.ratio > self.cap, torch.full_like(at.ratio, self.cap), at.ratio)

    def trap(self) -> str | None:
        return SgClip(1.0, self.cap).trap()

    def weight_formula(self) -> str:
        return SgClip(1.0, self.cap).weight_formula()

    def weight_code(self) -> list[str]:
        return [f"w = r.clamp(max={self.cap})"]


@dataclass(frozen=True)
class Taper(_Weighted):
    """Rewarded completions: ℓ = -A·logp; the others: ℓ = -sg(min(r, cap))·A·logp (TOPR, arXiv:2503.14286).

    split="reward" divides by R > 0, and by A > 0 only where the batch has no reward.
    """

    option: ClassVar[str] = "taper"
    cap: float = param("cap", 1.0, "the largest weight of a completion that is not rewarded", above=0, bound=True)
    split: str = param("split", "reward", "what divides good from bad completions", choices=("reward", "advantage"))

    @property
    def looks_at(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"reward"} if self.split == "reward" else ())

    def printed(self, at: Tokens) -> Tensor:
        good = at.advantage >= 0
        if self.split == "reward" and at.batch is not None and at.batch.reward is not None:
            reward = at.batch.reward
            good = (reward if reward.ndim == 1 else reward.sum(1))[:, None] > 0
        return torch.where(good, torch.ones_like(at.ratio), at.ratio.clamp(max=self.cap))

    def weight(self, at: Tokens) -> Tensor:
        bad = at.advantage < 0
        if self.split == "reward" and at.batch is not None and at.batch.reward is not None:
            bad = at.batch.reward.reshape(len(at.mask), -1).sum(1, keepdim=True) <= 0
        capped = torch.where(at.ratio > self.cap, torch.full_like(at.ratio, self.cap), at.ratio)
        return torch.where(bad, capped, torch.ones_like(at.ratio))

    def weight_formula(self) -> str:
        good = "R > 0" if self.split == "reward" else "A ≥ 0"
        return f"1 if {good} else min(r, {number(self.cap)})"

    def weight_code(self) -> list[str]:
        good = "R[:, None] > 0" if self.split == "reward" else "A >= 0"
        return [f"w = torch.where({good}, 1.0, r.clamp(max={self.cap}))"]


@dataclass(frozen=True)
class Band(_Weighted):
    """ℓ = -sg(r·1[1 - low < r < 1 + high])·A·logp: nothing outside the band, whatever the sign of A.

    The band of IcePop (arXiv:2510.18855), taken on the loss's own ratio; mismatch='icepop' takes it on π_old/μ."""

    option: ClassVar[str] = "band"
    low: float = param("clip_low", 0.2, "1 - clip_low is the lower end of the band", low=0, bound=True)
    high: float = param("clip_high", 0.2, "1 + clip_high is the upper end of the band", low=0, bound=True)

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return 1 - self.low, 1 + self.high

    def printed(self, at: Tokens) -> Tensor:
        inside = (at.ratio > 1 - self.low) & (at.ratio < 1 + self.high)
        return torch.where(inside, at.ratio, torch.zeros_like(at.ratio))

    def weight(self, at: Tokens) -> Tensor:
        outside = (at.ratio <= 1 - self.low) | (at.ratio >= 1 + self.high)
        return torch.where(outside, torch.zeros_like(at.ratio), at.ratio)

    def weight_formula(self) -> str:
        return f"r·[{number(max(1 - self.low, 0))} < r < {number(1 + self.high)}]"

    def weight_code(self) -> list[str]:
        return [f"w = torch.where((r > 1 - {self.low}) & (r < 1 + {self.high}), r, 0.0)"]


@dataclass(frozen=True)
class Gamma(_Weighted):
    """ℓ = -sg(φ(r))·A·logp, φ(W) = exp(λ + k·ln W - λW) (VESPO, arXiv:2602.10693); W is a completion's ratio there.

    (k, λ) depend on the sign of A; φ(1) = 1. ln W is bounded below by ln 1e-8.
    """

    option: ClassVar[str] = "gamma"
    k_pos: float = param("k_pos", 2.0, "shape k for A >= 0", low=0)
    lam_pos: float = param("lam_pos", 3.0, "rate λ for A >= 0", low=0)
    k_neg: float = param("k_neg", 3.0, "shape k for A < 0", low=0)
    lam_neg: float = param("lam_neg", 2.0, "rate λ for A < 0", low=0)

    def printed(self, at: Tokens) -> Tensor:
        w = at.ratio.clamp(min=1e-8)
        up, down = (
            torch.exp(lam + k * w.log() - lam * w)
            for k, lam in ((self.k_pos, self.lam_pos), (self.k_neg, self.lam_neg))
        )
        return torch.where(at.advantage >= 0, up, down)

    def weight(self, at: Tokens) -> Tensor:
        ratio = at.ratio.clamp(min=1e-8)
        power = torch.where(at.advantage < 0, ratio**self.k_neg, ratio**self.k_pos)
        rate = torch.where(at.advantage < 0, torch.full_like(ratio, self.lam_neg), self.lam_pos)
        return power * torch.exp(rate * (1 - ratio))

    def weight_formula(self) -> str:
        k = f"k = {number(self.k_pos)} if A ≥ 0 else {number(self.k_neg)}"
        return f"r^k·e^(λ·(1 − r)) where {k}; λ = {number(self.lam_pos)} if A ≥ 0 else {number(self.lam_neg)}"

    def weight_code(self) -> list[str]:
        return [
            f"k = torch.where(A >= 0, torch.full_like(A, {self.k_pos}), {self.k_neg})",
            f"lam = torch.where(A >= 0, torch.full_like(A, {self.lam_pos}), {self.lam_neg})",
            "w = r.clamp(min=1e-8) ** k * torch.exp(lam * (1 - r.clamp(min=1e-8)))",
        ]


@dataclass(frozen=True)
class Sigmoid(Trust):
    """ℓ = -(4/τ)·σ(τ(r - 1))·A, τ by the sign of A: a soft gate whose weight is 1 at r = 1 (SAPO, arXiv:2511.20347)."""

    option: ClassVar[str] = "sigmoid"
    tau_pos: float = param("tau_pos", 1.0, "temperature of the gate for A > 0", above=0)
    tau_neg: float = param("tau_neg", 1.05, "temperature of the gate for A <= 0", above=0)

    def _tau(self, at: Tokens) -> Tensor:
        return torch.where(at.advantage > 0, torch.full_like(at.advantage, self.tau_pos), self.tau_neg)

    def value(self, at: Tokens) -> Tensor:
        tau = self._tau(at)
        return -(4 / tau) * torch.sigmoid(tau * (at.ratio - 1)) * at.advantage

    def weight(self, at: Tokens) -> Tensor:
        tau = torch.where(at.advantage >= 0, torch.full_like(at.advantage, self.tau_pos), self.tau_neg)  # A -> 0+
        gate = torch.sigmoid(tau * (at.ratio - 1))
        return 4 * gate * (1 - gate) * at.ratio

    def formula(self) -> str:
        return f"(4/τ)·σ(τ·(r − 1))·A where τ = {number(self.tau_pos)} if A > 0 else {number(self.tau_neg)}"

    def code(self) -> list[str]:
        return [
            f"tau = torch.where(A > 0, torch.full_like(A, {self.tau_pos}), {self.tau_neg})",
            "loss = -4 / tau * torch.sigmoid(tau * (r - 1)) * A",
        ]


@dataclass(frozen=True)
class Quadratic(Trust):
    """ℓ = -A·logp + (τ/2)·Δ², Δ = log r (DRO, arXiv:2405.19107; Kimi k1.5, arXiv:2501.12599, in token form)."""

    option: ClassVar[str] = "quadratic"
    acts_alone: ClassVar[bool] = True
    through: ClassVar[str] = "logp"
    token_only: ClassVar[bool] = True
    tau: float = param("tau", 0.05, "strength of the pull back to the old policy", low=0)

    @property
    def homogeneous(self) -> bool:  # type: ignore[override]
        return self.tau == 0

    def value(self, at: Tokens) -> Tensor:
        return -at.advantage * at.logp + 0.5 * self.tau * at.delta**2

    def slope(self, at: Tokens) -> Tensor:
        return torch.where(at.advantage == 0, self.tau * at.delta, -self.weight(at) * at.advantage)

    def weight(self, at: Tokens) -> Tensor:
        pull = self.tau * at.delta
        return 1 - torch.where(pull == 0, torch.zeros_like(pull), pull / at.advantage)

    def formula(self) -> str:
        return f"A·log π_θ(y_t) − {number(self.tau / 2)}·(log r)²"

    def code(self) -> list[str]:
        return [f"loss = -A * logp + {self.tau} / 2 * (logp - denominator_logp) ** 2"]

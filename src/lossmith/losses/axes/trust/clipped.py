"""Ratios that a bound stops: PPO's clip and its descendants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.errors import LossError
from lossmith.losses.axes.ratio import bounded_exp
from lossmith.losses.axes.trust.base import Tokens, Trust
from lossmith.losses.piece import number, param, symbol

__all__ = ["BalancedClip", "BookClip", "Clip", "DynamicClip", "Influence", "Preserve"]

Bound = Tensor | float


def printed(at: Tokens, low: Bound, high: Bound, dual: float | None = None) -> Tensor:
    """ℓ = -min(r·A, clip(r, low, high)·A); with `dual` and A < 0 never more than -dual·A."""
    clipped = at.ratio.clamp(low, high)  # type: ignore[arg-type]  # two numbers or two tensors, never one of each
    loss = -torch.minimum(at.ratio * at.advantage, clipped * at.advantage)
    if dual is None:
        return loss
    return loss.clamp(max=torch.where(at.advantage < 0, -dual * at.advantage, torch.inf))


def stopped(at: Tokens, low: Bound, high: Bound, dual: float | None = None) -> Tensor:
    """[N, T] bool, by hand: where ℓ is constant: r > high for A >= 0, and r < low or r > dual for A < 0."""
    ratio, good = at.ratio.detach(), at.advantage >= 0
    beyond = torch.where(good, ratio > high, ratio < low)
    return beyond if dual is None else beyond | (~good & (ratio > dual))


def unless(stopped: Tensor, at: Tokens) -> Tensor:
    """w = r, or 0 where a bound holds."""
    return torch.where(stopped, torch.zeros_like(at.ratio), at.ratio)


def _dual(text: str, dual: float | None) -> str:
    """The clipped product, and what a dual clip makes of it."""
    return text if dual is None else f"max(x, {number(dual)}·A) if A < 0 else x where x = {text}"


def _dual_code(dual: float | None) -> list[str]:
    return [] if dual is None else [f"loss = torch.where(A < 0, torch.minimum(loss, -{dual} * A), loss)"]


@dataclass(frozen=True)
class Clip(Trust):
    """ℓ = -min(r·A, clip(r, 1 - low, 1 + high)·A) (PPO, arXiv:1707.06347, eq. 7).

    With `dual` and A < 0: never more than -dual·A (dual-clip PPO, arXiv:1912.09729, eq. 5).
    """

    option: ClassVar[str] = "clip"
    low: float = param("clip_low", 0.2, "how far below 1 the ratio still counts when A < 0", low=0, bound=True)
    high: float = param("clip_high", 0.2, "how far above 1 the ratio still counts when A > 0", low=0, bound=True)
    dual: float | None = param(
        "dual_clip", None, "bound on the ratio when A < 0; none if not given", above=1, bound=True
    )

    def value(self, at: Tokens) -> Tensor:
        return printed(at, 1 - self.low, 1 + self.high, self.dual)

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return 1 - self.low, 1 + self.high

    def weight(self, at: Tokens) -> Tensor:
        return unless(stopped(at, 1 - self.low, 1 + self.high, self.dual), at)

    def formula(self) -> str:
        return _dual(f"min(r·A, clip(r, {number(max(1 - self.low, 0))}, {number(1 + self.high)})·A)", self.dual)

    def code(self) -> list[str]:
        return [
            f"loss = torch.maximum(-r * A, -r.clamp(1 - {self.low}, 1 + {self.high}) * A)",
            *_dual_code(self.dual),
        ]


@dataclass(frozen=True)
class BookClip(Trust):
    """ℓ = -A·min(r, 1 + high): the book's eq. 4.50 as printed, a demonstration.

    The minimum is taken before the product with A, so the lower bound never binds, and a worsening action
    (A < 0, r > 1 + high) gets no gradient. The same as PPO's clip only where A >= 0.
    """

    option: ClassVar[str] = "book_clip"
    high: float = param(
        "clip_high", 0.2, "how far above 1 the ratio still counts, whatever the sign of A", low=0, bound=True
    )

    def value(self, at: Tokens) -> Tensor:
        return -at.advantage * at.ratio.clamp(max=1 + self.high)

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return 0.0, 1 + self.high

    def weight(self, at: Tokens) -> Tensor:
        return unless(at.ratio > 1 + self.high, at)

    def trap(self) -> str | None:
        return (
            "the book's clip (eq. 4.50 as printed) gives no gradient to a worsening action (A < 0, r > "
            f"{number(1 + self.high)}) and never binds below; it is a demonstration, use trust='clip' (PPO) to train"
        )

    def formula(self) -> str:
        return f"min(r, {number(1 + self.high)})·A"

    def code(self) -> list[str]:
        return [f"loss = -A * r.clamp(max=1 + {self.high})"]


@dataclass(frozen=True)
class Preserve(Trust):
    """PPO's clip whose bounds keep a gradient: outside the band ℓ = -β·bound·(r/sg(r))·A.

    GPPO (arXiv:2508.07629) with both β = 1; CE-GPPO (arXiv:2509.20712) scales them and adds a dual clip.
    """

    option: ClassVar[str] = "preserve"
    stops_gradient: ClassVar[bool] = True
    low: float = param("clip_low", 0.2, "how far below 1 the ratio counts in full when A < 0", low=0, bound=True)
    high: float = param("clip_high", 0.28, "how far above 1 the ratio counts in full when A > 0", low=0, bound=True)
    beta_low: float = param("beta_low", 1.0, "share of the lower bound's gradient that is kept", low=0)
    beta_high: float = param("beta_high", 1.0, "share of the upper bound's gradient that is kept", low=0)
    dual: float | None = param(
        "dual_clip", None, "bound on the ratio when A < 0; none if not given", above=1, bound=True
    )

    def value(self, at: Tokens) -> Tensor:
        ratio, good = at.ratio.detach(), at.advantage >= 0
        up, down = good & (ratio > 1 + self.high), ~good & (ratio < 1 - self.low)
        above, below = self.beta_high * (1 + self.high), self.beta_low * (1 - self.low)
        bound = torch.where(up, torch.full_like(ratio, above), below)
        kept = torch.where(up | down, bound, torch.zeros_like(ratio))  # a bound of infinity is nowhere multiplied
        # r/sg(r) has the value 1 and the gradient of log r
        c = torch.where(up | down, kept * (at.ratio / at.ratio.detach()), at.ratio)
        if self.dual is not None:
            c = torch.where(~good & (ratio > self.dual), self.dual, c)
        return -at.advantage * c

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return 1 - self.low, 1 + self.high

    def weight(self, at: Tokens) -> Tensor:
        ratio, low, high = at.ratio, 1 - self.low, 1 + self.high
        rewarded = torch.where(ratio <= high, ratio, torch.full_like(ratio, self.beta_high * high))
        punished = torch.where(ratio >= low, ratio, torch.full_like(ratio, self.beta_low * low))
        if self.dual is not None:
            punished = torch.where(ratio <= self.dual, punished, torch.zeros_like(ratio))
        return torch.where(at.advantage < 0, punished, rewarded)

    def formula(self) -> str:
        lo, hi = number(max(1 - self.low, 0)), number(1 + self.high)
        up = f"{number(self.beta_high)}·{hi}·r/sg(r) if A ≥ 0 and r > {hi}"
        down = f"{number(self.beta_low)}·{lo}·r/sg(r) if A < 0 and r < {lo}"
        far = "" if self.dual is None else f"{number(self.dual)} if A < 0 and r > {number(self.dual)} else "
        return f"c·A where c = {far}{up} else {down} else r"

    def code(self) -> list[str]:
        lines = [
            "kept = r / r.detach()  # 1, with the gradient of log r",
            f"up, down = (A >= 0) & (r > 1 + {self.high}), (A < 0) & (r < 1 - {self.low})",
            f"c = torch.where(up, {self.beta_high} * (1 + {self.high}) * kept, r)",
            f"c = torch.where(down, {self.beta_low} * (1 - {self.low}) * kept, c)",
            "loss = -c * A",
        ]
        far = f"loss = torch.where((A < 0) & (r > {self.dual}), -{self.dual} * A, loss)"
        return lines if self.dual is None else [*lines, far]


@dataclass(frozen=True)
class DynamicClip(Trust):
    """PPO's clip with bounds that widen for rare tokens (DCPO, arXiv:2509.02333).

    With q the old probability: low = ½(1 + √max(1 - 4·clip_low/q, 0)), high = ½(1 + √(1 + 4·clip_high/q)) <= hi_max.
    """

    option: ClassVar[str] = "dynamic_clip"
    token_only: ClassVar[bool] = True
    low: float = param("clip_low", 0.16, "sets the lower bound, through the old probability", low=0, bound=True)
    high: float = param("clip_high", 0.2, "sets the upper bound, through the old probability", low=0, bound=True)
    hi_max: float = param("hi_max", 10.0, "largest upper bound", above=1, bound=True)
    dual: float | None = param(
        "dual_clip", None, "bound on the ratio when A < 0; none if not given", above=1, bound=True
    )

    def value(self, at: Tokens) -> Tensor:
        return printed(at, *self._range(at), self.dual)

    def bounds(self, at: Tokens) -> tuple[Bound, Bound]:
        return self._range(at)

    def weight(self, at: Tokens) -> Tensor:
        # r lies beyond a bound where |r² - r|·q, of which the bounds are the roots, is above its ε
        ratio, bad = at.ratio, at.advantage < 0
        excess = ratio * (ratio - 1) * bounded_exp(at.denominator_logp)
        above = ((excess > self.high) & (ratio > 1)) | (ratio > self.hi_max)
        below = (-excess > self.low) | (ratio < 0.5)
        if self.dual is not None:
            below = below | (ratio > self.dual)
        return unless(torch.where(bad, below, above), at)

    def _range(self, at: Tokens) -> tuple[Tensor, Tensor]:
        inverse = bounded_exp(-at.denominator_logp)
        low = 0.5 * (1 + (1 - 4 * self.low * inverse).clamp(min=0).sqrt())
        high = (0.5 * (1 + (1 + 4 * self.high * inverse).sqrt())).clamp(max=self.hi_max)
        return low, high

    def formula(self) -> str:
        a, b, c = number(4 * self.low), number(4 * self.high), number(self.hi_max)
        clipped = _dual("min(r·A, clip(r, a, b)·A)", self.dual)
        lo, hi = f"½(1 + √max(1 − {a}/π_old(y_t), 0))", f"min(½(1 + √(1 + {b}/π_old(y_t))), {c})"
        return f"{clipped}{'; ' if ' where ' in clipped else ' where '}a = {lo}; b = {hi}"

    def code(self) -> list[str]:
        return [
            "q = denominator_logp.exp()",
            f"lo = 0.5 * (1 + (1 - 4 * {self.low} / q).clamp(min=0).sqrt())",
            f"hi = (0.5 * (1 + (1 + 4 * {self.high} / q).sqrt())).clamp(max={self.hi_max})",
            "loss = torch.maximum(-r * A, -r.clamp(lo, hi) * A)",
            *_dual_code(self.dual),
        ]


@dataclass(frozen=True)
class BalancedClip(Trust):
    """PPO's clip with bounds that move until positive advantages carry their share (BAPO, arXiv:2510.18927).

    P = Σ_{A>0} min(r, high)·A and Q = Σ_{A<0} max(r, low)·|A| over the batch. low rises from low_start by low_step,
    then high from high_start by high_step, until P/(P + Q) >= target or both stand at their maximum. The form of the
    authors' code: the paper also weights P and Q by π. No step sizes are agreed.
    """

    option: ClassVar[str] = "balanced_clip"
    ordered: ClassVar[tuple[tuple[str, str], ...]] = (
        ("low_start", "low_max"), ("low_max", "high_start"), ("high_start", "high_max"),
    )  # fmt: skip
    whole_batch: ClassVar[bool] = True
    low_start: float = param("low_start", 0.6, "first lower bound of the ratio", low=0)
    low_max: float = param("low_max", 0.9, "last lower bound of the ratio", low=0)
    low_step: float | None = param("low_step", None, "by how much the lower bound rises", above=0, required=True)
    high_start: float = param("high_start", 1.2, "first upper bound of the ratio", above=0)
    high_max: float = param("high_max", 3.0, "last upper bound of the ratio", above=0)
    high_step: float | None = param("high_step", None, "by how much the upper bound rises", above=0, required=True)
    target: float = param("target", 0.5, "wanted share of positive advantages", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, way in (("low_step", self.low_max - self.low_start), ("high_step", self.high_max - self.high_start)):
            step = getattr(self, name)
            if step is not None and way / step > 10_000:
                raise LossError(f"balanced_clip: {name} = {step} takes more than 10,000 steps to the last bound.")

    def value(self, at: Tokens) -> Tensor:
        return printed(at, *self._range(at.detach()))

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return self._range(at.detach())

    def weight(self, at: Tokens) -> Tensor:
        return unless(stopped(at, *self._reached(at.detach())), at)

    def _reached(self, at: Tokens) -> tuple[float, float]:
        """The first bounds, of all in their order, under which P·(1 - target) >= Q·target."""
        lows = _ladder(self.low_start, self.low_max, self.given("low_step"))
        highs = _ladder(self.high_start, self.high_max, self.given("high_step"))
        bounds = [*((low, highs[0]) for low in lows), *((lows[-1], high) for high in highs[1:])]
        gain, harm = (
            torch.where(at.mask, x, torch.zeros_like(x)) for x in (at.advantage.relu(), (-at.advantage).relu())
        )
        for low, high in bounds[:-1]:
            ratio = at.ratio
            positive = (gain * torch.where(ratio > high, torch.full_like(ratio, high), ratio)).sum()
            negative = (harm * torch.where(ratio < low, torch.full_like(ratio, low), ratio)).sum()
            if bool(positive * (1 - self.target) >= negative * self.target):
                return low, high
        return bounds[-1]

    def _range(self, at: Tokens) -> tuple[float, float]:
        good, bad = at.mask & (at.advantage > 0), at.mask & (at.advantage < 0)
        ratio, advantage = at.ratio.expand_as(at.mask), at.advantage.expand_as(at.mask)
        up, gain = ratio[good], advantage[good]
        down, harm = ratio[bad], advantage[bad].abs()

        def enough(low: float, high: float) -> bool:
            p, q = float((up.clamp(max=high) * gain).sum()), float((down.clamp(min=low) * harm).sum())
            return p >= self.target * (p + q)

        low, high = self.low_start, self.high_start
        for i in range(1, 1 + _steps(low, self.low_max, self.given("low_step"))):
            if enough(low, high):
                return low, high
            low = min(self.low_start + i * self.given("low_step"), self.low_max)
        for i in range(1, 1 + _steps(high, self.high_max, self.given("high_step"))):
            if enough(low, high):
                return low, high
            high = min(self.high_start + i * self.given("high_step"), self.high_max)
        return low, high

    def formula(self) -> str:
        lo = f"{number(self.low_start)}…{number(self.low_max)} by {symbol(self.low_step, 'δ')}"
        hi = f"{number(self.high_start)}…{number(self.high_max)} by {symbol(self.high_step, 'η')}"
        return f"min(r·A, clip(r, a, b)·A) where (a, b) = balance(r, A, {lo}, {hi}, {number(self.target)})"

    def code(self) -> list[str]:
        return [
            f"lo, hi = {self.low_start}, {self.high_start}",
            "def short(lo, hi):  # positive advantages carry less than their share",
            "    p = (r.detach().clamp(max=hi) * A)[mask & (A > 0)].sum()",
            "    q = (r.detach().clamp(min=lo) * -A)[mask & (A < 0)].sum()",
            f"    return p < {self.target} * (p + q)",
            f"while lo < {self.low_max} and short(lo, hi): lo = min(lo + {self.low_step}, {self.low_max})",
            f"while hi < {self.high_max} and short(lo, hi): hi = min(hi + {self.high_step}, {self.high_max})",
            "loss = torch.maximum(-r * A, -r.clamp(lo, hi) * A)",
        ]


def _steps(start: float, end: float, step: float) -> int:
    """How many steps lead from start to end; a last, smaller one included."""
    return max(0, -int(-(end - start) / step // 1))


def _ladder(start: float, end: float, step: float) -> list[float]:
    """start, start + step, ..., end."""
    inner = range(math.ceil((end - start) / step))
    return [start + i * step for i in inner if start + i * step < end] + [end]


@dataclass(frozen=True)
class Influence(Trust):
    """ℓ = f·ℓ_clip, with f_t = sg(clip(exp(Σ_{k>=t} gamma^(k-t) Δ_k), low, 1 + fipo_clip)) (FIPO, arXiv:2603.19835).

    Masked tokens add nothing to the sum, but count as a step of gamma.
    """

    option: ClassVar[str] = "influence"
    token_only: ClassVar[bool] = True
    stops_gradient: ClassVar[bool] = True
    low: float = param("clip_low", 0.2, "how far below 1 the ratio still counts when A < 0", low=0, bound=True)
    high: float = param("clip_high", 0.2, "how far above 1 the ratio still counts when A > 0", low=0, bound=True)
    gamma: float = param("gamma", 2 ** (-1 / 32), "discount of later tokens' log-ratios", low=0, high=1)
    floor: float = param("fipo_low", 1.0, "smallest influence", low=0)
    ceiling: float = param("fipo_clip", 0.2, "1 + fipo_clip is the largest influence", low=0)

    def value(self, at: Tokens) -> Tensor:
        step = torch.arange(at.mask.shape[1], device=at.mask.device, dtype=at.ratio.dtype)
        gap = step[:, None] - step[None]  # from token t (column) to token k (row)
        discount = torch.where(gap >= 0, self.gamma ** gap.clamp(min=0), torch.zeros_like(gap))
        influence = bounded_exp(at.delta.detach() @ discount).clamp(self.floor, 1 + self.ceiling)
        return influence * printed(at, 1 - self.low, 1 + self.high)

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return 1 - self.low, 1 + self.high

    def weight(self, at: Tokens) -> Tensor:
        future, found = torch.zeros_like(at.delta[:, :1]), list[Tensor]()
        for delta in reversed(at.delta.split(1, dim=1)):  # Δ_t and what follows it, discounted once more
            future = delta + self.gamma * future
            found.append(future)
        influence = bounded_exp(torch.cat([*reversed(found)], 1) if found else at.delta)
        least, most = torch.full_like(influence, self.floor), torch.full_like(influence, 1 + self.ceiling)
        return torch.minimum(torch.maximum(influence, least), most) * unless(
            stopped(at, 1 - self.low, 1 + self.high), at
        )

    def formula(self) -> str:
        half_life = -1 / math.log2(self.gamma) if 0 < self.gamma < 1 else 0.5
        whole = abs(half_life - round(half_life)) < 1e-9
        discount = f"2^(−(k − t)/{round(half_life)})" if whole else f"{number(self.gamma)}^(k − t)"
        future = f"Σ_{{k≥t}} {discount}·log(π_θ(y_k)/π_old(y_k))"
        influence = f"f = sg(clip(exp({future}), {number(self.floor)}, {number(1 + self.ceiling)}))"
        return f"f·{Clip(self.low, self.high).formula()} where {influence}"

    def code(self) -> list[str]:
        return [
            "k = torch.arange(mask.shape[1])",
            "gap = (k[:, None] - k).to(r.dtype)",
            f"discount = torch.where(gap >= 0, {self.gamma} ** gap.clamp(min=0), 0.0)",
            "future = ((logp - denominator_logp).detach() * mask) @ discount  # Σ_{k≥t} gamma^(k−t) log r_k",
            f"f = future.exp().clamp({self.floor}, 1 + {self.ceiling})",
            *Clip(self.low, self.high).code(),
            "loss = f * loss",
        ]

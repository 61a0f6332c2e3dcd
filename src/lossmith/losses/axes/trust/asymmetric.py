"""Regions that treat what is made likelier and what is made rarer differently, or that penalize in place of a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.trust.base import Tokens, Trust
from lossmith.losses.piece import number, param

__all__ = ["PrefixBudget", "QuadraticPenalty", "Reciprocal", "Unbounded"]


@dataclass(frozen=True)
class Unbounded(Trust):
    """A > 0: ℓ = -A·r/sg(r), a policy gradient without a bound; else PPO's clip (UP, arXiv:2607.06987)."""

    option: ClassVar[str] = "unbounded"
    stops_gradient: ClassVar[bool] = True
    low: float = param("clip_low", 0.2, "how far below 1 the ratio still counts when A < 0", low=0, bound=True)
    dual: float | None = param(
        "dual_clip", None, "bound on the ratio when A < 0; none if not given", above=1, bound=True
    )

    def value(self, at: Tokens) -> Tensor:
        clipped = at.ratio.clamp(max(1 - self.low, 0.0), math.inf if self.dual is None else self.dual)
        free = -at.advantage * at.ratio / at.ratio.detach()
        return torch.where(at.advantage > 0, free, -clipped * at.advantage)

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return 1 - self.low, math.inf

    def weight(self, at: Tokens) -> Tensor:
        far = at.ratio < 1 - self.low
        if self.dual is not None:
            far = far | (at.ratio > self.dual)
        bad = torch.where(far, torch.zeros_like(at.ratio), at.ratio)
        return torch.where(at.advantage < 0, bad, torch.ones_like(at.ratio))

    def formula(self) -> str:
        high = "∞" if self.dual is None else number(self.dual)
        return f"A·r/sg(r) if A > 0 else clip(r, {number(max(1 - self.low, 0))}, {high})·A"

    def code(self) -> list[str]:
        high = "" if self.dual is None else f", {self.dual}"
        return [
            f"clipped = r.clamp({max(1 - self.low, 0.0)}{high})",
            "loss = -torch.where(A > 0, r / r.detach(), clipped) * A",
        ]


@dataclass(frozen=True)
class Reciprocal(Trust):
    """A > 0: ℓ = -A·sg(1/r)·r/sg(r) up to r = 1 + high, so that tokens left behind count more; else PPO's clip (ASPO,
    arXiv:2510.06062). With `dual`, 1/r counts no more than that.
    """

    option: ClassVar[str] = "reciprocal"
    stops_gradient: ClassVar[bool] = True
    low: float = param("clip_low", 0.2, "how far below 1 the ratio still counts when A < 0", low=0, bound=True)
    high: float = param("clip_high", 0.2, "how far above 1 the ratio still counts when A > 0", low=0, bound=True)
    dual: float | None = param("dual_clip", None, "the largest 1/r when A > 0; none if not given", above=1, bound=True)

    def value(self, at: Tokens) -> Tensor:
        now = at.ratio.detach()
        flipped = (1 / now).clamp(max=math.inf if self.dual is None else self.dual)
        kept = torch.where(now <= 1 + self.high, flipped * at.ratio / now, torch.zeros_like(now))
        return -torch.where(at.advantage > 0, kept, at.ratio.clamp(min=1 - self.low)) * at.advantage

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return 1 - self.low, 1 + self.high

    def weight(self, at: Tokens) -> Tensor:
        ratio, none = at.ratio, torch.zeros_like(at.ratio)
        least = ratio if self.dual is None else torch.maximum(ratio, torch.full_like(ratio, 1 / self.dual))
        good = torch.where(ratio > 1 + self.high, none, 1 / least)
        return torch.where(at.advantage < 0, torch.where(ratio < 1 - self.low, none, ratio), good)

    def formula(self) -> str:
        flipped = "1/r" if self.dual is None else f"min(1/r, {number(self.dual)})"
        good = f"A·sg({flipped})·r/sg(r)·[r ≤ {number(1 + self.high)}]"
        return f"{good} if A > 0 else max(r, {number(max(1 - self.low, 0))})·A"

    def code(self) -> list[str]:
        most = "" if self.dual is None else f".clamp(max={self.dual})"
        return [
            f"good = (1 / r.detach()){most} * r / r.detach() * (r <= 1 + {self.high})",
            f"loss = -torch.where(A > 0, good, r.clamp(min=1 - {self.low})) * A",
        ]


@dataclass(frozen=True)
class QuadraticPenalty(Trust):
    """ℓ = -A·r + |A|/(2·eps)·(r - 1)²: no bound, and a gradient everywhere; it turns back where |r - 1| > eps (CFPO,
    arXiv:2601.22801; SPO, arXiv:2401.16025).
    """

    option: ClassVar[str] = "quadratic_penalty"
    width: float = param("penalty_width", 0.2, "how far from 1 the best ratio lies", above=0)

    def value(self, at: Tokens) -> Tensor:
        return -at.ratio * at.advantage + at.advantage.abs() / (2 * self.width) * (at.ratio - 1) ** 2

    def weight(self, at: Tokens) -> Tensor:
        side = torch.where(at.advantage < 0, -torch.ones_like(at.ratio), torch.ones_like(at.ratio))
        return at.ratio - side * at.ratio * (at.ratio - 1) / self.width

    def formula(self) -> str:
        return f"r·A − |A|/{number(2 * self.width)}·(r − 1)²"

    def code(self) -> list[str]:
        return [f"loss = -r * A + A.abs() / (2 * {self.width}) * (r - 1) ** 2"]


@dataclass(frozen=True)
class PrefixBudget(Trust):
    """ℓ = -A·r, without tokens that go on moving away: A·(r - 1) > 0 and h_t·D_t > min(delta, delta + Σ_{k<t} h_k·
    (budget - D_k)), D = |p - q| of the sampled token, h falling from 1 to `floor` (CPPO, arXiv:2606.10968, eq. 8, 9).
    """

    option: ClassVar[str] = "prefix_budget"
    token_only: ClassVar[bool] = True
    delta: float = param("delta", 0.15, "largest weighed move of a token's probability", above=0, bound=True)
    budget: float = param("prefix_delta", 0.02, "largest weighed mean move of the tokens before", above=0)
    floor: float = param("position_floor", 0.8, "weight of the last token's move; the first has 1", above=0, high=1)

    def value(self, at: Tokens) -> Tensor:
        now, mask = at.detach(), at.mask.to(at.ratio.dtype)
        place = mask.cumsum(1) - mask
        h = (1 - (1 - self.floor) * place / (at.lengths - 1).clamp(min=1)) * mask
        moved = h * (now.logp.exp() - now.denominator_logp.exp()).abs()
        before = self.budget * (h.cumsum(1) - h) - (moved.cumsum(1) - moved)
        allowed = self.delta + before.clamp(max=0)
        keep = (at.advantage * (now.ratio - 1) <= 0) | (moved <= allowed)
        return -at.advantage * torch.where(keep, at.ratio, torch.zeros_like(at.ratio))

    def weight(self, at: Tokens) -> Tensor:
        spent, place, found = torch.zeros_like(at.ratio[:, :1]), torch.zeros_like(at.ratio[:, :1]), list[Tensor]()
        last = (at.lengths - 1).clamp(min=1)
        move = at.denominator_logp.exp() * (at.ratio - 1)
        for here, ratio, good, valid in zip(
            *(x.split(1, dim=1) for x in (move, at.ratio, (at.advantage >= 0).expand_as(move), at.mask)), strict=True
        ):
            h = (last - (1 - self.floor) * place) / last
            size = h * torch.maximum(here, -here)
            far = (size > self.delta) | (size + spent > self.delta)
            outward = torch.where(good, ratio > 1, ratio < 1)
            found.append(torch.where(far & outward, torch.zeros_like(ratio), ratio))
            spent = spent + torch.where(valid, size - h * self.budget, torch.zeros_like(size))
            place = place + valid.to(place.dtype)
        return torch.cat(found, 1) if found else at.ratio

    def formula(self) -> str:
        d, b, c = number(self.delta), number(self.budget), number(1 - self.floor)
        near = f"h·D ≤ min({d}, {d} + Σ_{{k<t}} h_k·({b} − D_k))"
        places = f"h = 1 − {c}·(Σ_{{k<t}} 1)/(T − 1)"
        return f"r·A·[A·(r − 1) ≤ 0 or {near}] where {places}; D = |π_θ(y_t) − π_old(y_t)|"

    def code(self) -> list[str]:
        return [
            "place, last = torch.arange(mask.shape[1]), (mask.sum(1, keepdim=True) - 1).clamp(min=1)",
            f"h = (1 - (1 - {self.floor}) * place / last) * mask  # tokens stand at the left",
            "moved = h * (logp.detach().exp() - denominator_logp.exp()).abs()",
            f"before = {self.budget} * (h.cumsum(1) - h) - (moved.cumsum(1) - moved)",
            f"keep = (A * (r - 1) <= 0) | (moved <= {self.delta} + before.clamp(max=0))",
            "loss = -r * A * keep",
        ]

"""Tokens that are let through or dropped: by how far their probability moved, by covariance, by a second moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.ratio import LOG_RATIO_BOUND
from lossmith.losses.axes.trust.base import Tokens, Trust
from lossmith.losses.axes.trust.clipped import Clip, printed, stopped, unless
from lossmith.losses.piece import number, param, symbol

__all__ = ["CovDrop", "CovKL", "KLMask", "Luffy", "M2Mask", "TVMask", "TVMaskSymmetric"]


@dataclass(frozen=True)
class TVMaskSymmetric(Trust):
    """ℓ = -A·r where |p - q| <= delta, else 0; p and q are the new and the old probability of the token."""

    option: ClassVar[str] = "tv_mask_symmetric"
    token_only: ClassVar[bool] = True
    delta: float = param("delta", 0.1, "largest move of a token's probability that still counts", above=0, bound=True)

    def value(self, at: Tokens) -> Tensor:
        keep = (at.logp.detach().exp() - at.denominator_logp.exp()).abs() <= self.delta
        return -at.advantage * torch.where(keep, at.ratio, torch.zeros_like(at.ratio))

    def weight(self, at: Tokens) -> Tensor:
        move = at.denominator_logp.exp() * (at.ratio - 1)
        return torch.where((move > self.delta) | (move < -self.delta), torch.zeros_like(at.ratio), at.ratio)

    def formula(self) -> str:
        return f"r·A·[|π_θ(y_t) − π_old(y_t)| ≤ {number(self.delta)}]"

    def code(self) -> list[str]:
        keep = f"keep = (logp.detach().exp() - denominator_logp.exp()).abs() <= {self.delta}"
        return [keep, "loss = -r * A * keep"]


class _Divergence(Trust):
    """Tokens that moved too far in the direction their advantage pushes are dropped (DPPO, arXiv:2602.04879).

    surrogate "logp": ℓ = -A·sg(min(r, cap))·logp·keep; "ratio": ℓ = -A·r·keep, and the cap is not used.
    """

    token_only: ClassVar[bool] = True
    cap: float | None
    surrogate: str

    def keep(self, at: Tokens) -> Tensor:
        """[N, T] bool from detached numbers, by the probabilities as the paper prints it."""
        raise NotImplementedError

    def dropped(self, at: Tokens) -> Tensor:
        """[N, T] bool from the ratio and the old probability, by hand."""
        raise NotImplementedError

    @property
    def through(self) -> str:  # type: ignore[override]
        return self.surrogate

    @property
    def stops_gradient(self) -> bool:  # type: ignore[override]
        return self.surrogate == "logp"

    def value(self, at: Tokens) -> Tensor:
        keep = self.keep(at.detach())
        if self.surrogate == "ratio":
            return -at.advantage * torch.where(keep, at.ratio, torch.zeros_like(at.ratio))
        ratio = at.ratio.detach() if self.cap is None else at.ratio.detach().clamp(max=self.cap)
        return -torch.where(keep, ratio, torch.zeros_like(ratio)) * at.advantage * at.logp

    def weight(self, at: Tokens) -> Tensor:
        ratio = at.ratio
        if self.surrogate == "logp" and self.cap is not None:
            ratio = torch.where(ratio > self.cap, torch.full_like(ratio, self.cap), ratio)
        return torch.where(self.dropped(at.detach()), torch.zeros_like(ratio), ratio)

    def dropped_formula(self) -> str:
        """The condition under which a token is dropped."""
        raise NotImplementedError

    def formula(self) -> str:
        keep = f"[not ({self.dropped_formula()})]"
        if self.surrogate == "ratio":
            return f"r·A·{keep}"
        return f"sg({'r' if self.cap is None else f'min(r, {number(self.cap)})'})·A·log π_θ(y_t)·{keep}"

    def keep_code(self) -> list[str]:
        """Lines that compute keep [N, T] from p and q."""
        raise NotImplementedError

    def code(self) -> list[str]:
        lines = ["p, q = logp.detach().exp(), denominator_logp.exp()", *self.keep_code()]
        if self.surrogate == "ratio":
            return [*lines, "loss = -r * A * keep"]
        cap = "" if self.cap is None else f".clamp(max={self.cap})"
        return [*lines, f"loss = -r.detach(){cap} * A * logp * keep"]


@dataclass(frozen=True)
class TVMask(_Divergence):
    """Drop A >= 0 with p - q > delta_high, and A < 0 with q - p > delta_low: total variation of the sampled token."""

    option: ClassVar[str] = "tv_mask"
    delta_low: float = param("delta_low", 0.2, "largest fall of a token's probability for A <= 0", low=0, bound=True)
    delta_high: float = param("delta_high", 0.2, "largest rise of a token's probability for A > 0", low=0, bound=True)
    cap: float | None = param(
        "cap", 20.0, "the largest weight (surrogate 'logp'); or none", above=0, optional=True, bound=True
    )
    surrogate: str = param("surrogate", "logp", "what carries the gradient", choices=("logp", "ratio"))

    def keep(self, at: Tokens) -> Tensor:
        move = at.logp.exp() - at.denominator_logp.exp()
        return torch.where(at.advantage >= 0, move <= self.delta_high, -move <= self.delta_low)

    def dropped(self, at: Tokens) -> Tensor:
        rise, bad = at.denominator_logp.exp() * (at.ratio - 1), at.advantage < 0
        return (bad & (rise < -self.delta_low)) | (~bad & (rise > self.delta_high))

    def dropped_formula(self) -> str:
        rising = f"A ≥ 0 and π_θ(y_t) − π_old(y_t) > {number(self.delta_high)}"
        return f"{rising} or A < 0 and π_old(y_t) − π_θ(y_t) > {number(self.delta_low)}"

    def keep_code(self) -> list[str]:
        return [f"keep = torch.where(A >= 0, p - q <= {self.delta_high}, q - p <= {self.delta_low})"]


@dataclass(frozen=True)
class KLMask(_Divergence):
    """Drop by the binary KL of the sampled token, b = q(ln q - ln p) + (1 - q)ln((1 - q)/(1 - p)).

    Dropped: A >= 0, p > q, b > delta_high; and A < 0, p < q, b > delta_low.
    """

    option: ClassVar[str] = "kl_mask"
    delta_low: float = param(
        "delta_low", 0.05, "largest binary KL of a falling token for A <= 0, nats", low=0, bound=True
    )
    delta_high: float = param(
        "delta_high", 0.05, "largest binary KL of a rising token for A > 0, nats", low=0, bound=True
    )
    cap: float | None = param(
        "cap", 20.0, "the largest weight (surrogate 'logp'); or none", above=0, optional=True, bound=True
    )
    surrogate: str = param("surrogate", "logp", "what carries the gradient", choices=("logp", "ratio"))

    def keep(self, at: Tokens) -> Tensor:
        p, q = at.logp.exp(), at.denominator_logp.exp()
        rest = (1 - q) * torch.log(((1 - q + 1e-8) / (1 - p + 1e-8)).clamp(min=1e-30))
        divergence = q * (at.denominator_logp - at.logp) + rest
        rising = (at.advantage >= 0) & (p > q) & (divergence > self.delta_high)
        falling = (at.advantage < 0) & (p < q) & (divergence > self.delta_low)
        return ~(rising | falling)

    def dropped(self, at: Tokens) -> Tensor:
        q, ratio, bad = at.denominator_logp.exp(), at.ratio, at.advantage < 0
        others = torch.log(1 - q + 1e-8) - torch.log((1 - q * ratio).clamp(min=0) + 1e-8)
        divergence = (1 - q) * others - q * ratio.log()
        far = torch.where(bad, divergence > self.delta_low, divergence > self.delta_high)
        return far & torch.where(bad, ratio < 1, ratio > 1)

    def dropped_formula(self) -> str:
        divergence, lo, hi = "KL₂(π_old(y_t)‖π_θ(y_t))", number(self.delta_low), number(self.delta_high)
        return f"A ≥ 0 and r > 1 and {divergence} > {hi} or A < 0 and r < 1 and {divergence} > {lo}"

    def keep_code(self) -> list[str]:
        return [
            "kl = q * (denominator_logp - logp.detach()) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()",
            f"rising = (A >= 0) & (p > q) & (kl > {self.delta_high})",
            f"falling = (A < 0) & (p < q) & (kl > {self.delta_low})",
            "keep = ~(rising | falling)",
        ]


@dataclass(frozen=True)
class M2Mask(Trust):
    """PPO's clip on tokens whose mean (log μ - log π_old)² is below m2_threshold (M2PO, arXiv:2510.01161).

    The tokens with the largest squares are dropped until it is. Dropped tokens stay in the normalizer.
    """

    option: ClassVar[str] = "m2_mask"
    whole_batch: ClassVar[bool] = True
    reads_old: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"behavior_logp"})
    low: float = param("clip_low", 0.2, "how far below 1 the ratio still counts when A < 0", low=0, bound=True)
    high: float = param("clip_high", 0.2, "how far above 1 the ratio still counts when A > 0", low=0, bound=True)
    threshold: float | None = param(
        "m2_threshold",
        None,
        "largest mean squared log-ratio of sampler and old policy",
        above=0,
        required=True,
        bound=True,
    )

    def value(self, at: Tokens) -> Tensor:
        clipped = printed(at, 1 - self.low, 1 + self.high)
        if at.batch is None:
            return clipped
        behavior = at.batch.require("behavior_logp", "trust='m2_mask'").detach()
        square = (behavior - at.batch.old("trust='m2_mask'"))[at.mask].double() ** 2
        order = square.argsort(descending=True)
        dropped = square[order].cumsum(0) - square[order]  # those before it, the largest ones
        left = torch.arange(len(square), 0, -1, device=square.device)
        kept = torch.zeros_like(square, dtype=torch.bool)
        kept[order] = (square.sum() - dropped) / left < self.given("threshold")
        return torch.where(torch.zeros_like(at.mask).masked_scatter(at.mask, kept), clipped, torch.zeros_like(clipped))

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return 1 - self.low, 1 + self.high

    def weight(self, at: Tokens) -> Tensor:
        weight = unless(stopped(at, 1 - self.low, 1 + self.high), at)
        if at.batch is None:
            return weight
        gap = at.batch.old("trust='m2_mask'") - at.batch.require("behavior_logp", "trust='m2_mask'").detach()
        square = gap[at.mask] ** 2
        order = square.argsort()
        mean = square[order].cumsum(0) / torch.arange(1, len(square) + 1, device=square.device)
        # sorted ascending, the running mean only grows: what stands before the first excess is kept
        kept = torch.zeros_like(square, dtype=torch.bool)
        kept[order] = mean < self.given("threshold")
        return torch.where(torch.zeros_like(at.mask).masked_scatter(at.mask, kept), weight, torch.zeros_like(weight))

    def formula(self) -> str:
        kept = f"lowest((log μ(y_t) − log π_old(y_t))², {symbol(self.threshold, 'M')})"
        return f"{Clip(self.low, self.high).formula()}·{kept}"

    def code(self) -> list[str]:
        return [
            *Clip(self.low, self.high).code(),
            "m2 = ((behavior_logp - old_logp) ** 2)[mask]",
            "order = m2.argsort()",
            "kept = torch.zeros_like(m2, dtype=torch.bool)",
            f"kept[order] = m2[order].cumsum(0) / torch.arange(1, len(m2) + 1) < {self.threshold}",
            "loss = torch.where(torch.zeros_like(mask).masked_scatter(mask, kept), loss, 0.0)",
        ]


def covariance(at: Tokens) -> Tensor:
    """(A_t - mean A)(logp_t - mean logp) [N, T], means over valid tokens (arXiv:2505.22317). No gradient."""
    count = at.mask.sum().clamp(min=1)

    def centered(x: Tensor) -> Tensor:
        x = torch.where(at.mask, x, torch.zeros_like(x))
        return x - x.sum() / count

    return torch.where(at.mask, centered(at.advantage) * centered(at.logp.detach()), torch.zeros_like(at.advantage))


def _multiplied_out(at: Tokens) -> Tensor:
    """The same by hand, for the weights: A·l - A·mean l - l·mean A + mean A·mean l."""
    a, l = (torch.where(at.mask, x, torch.zeros_like(x)) for x in (at.advantage, at.logp.detach()))  # noqa: E741
    mean_a, mean_l = (x[at.mask].sum() / max(int(at.mask.sum()), 1) for x in (a, l))
    return torch.where(at.mask, a * l - a * mean_l - l * mean_a + mean_a * mean_l, torch.zeros_like(a))


def _how_many(fraction: float, at: Tokens) -> int:
    return max(1, int(fraction * int(at.mask.sum())))


@dataclass(frozen=True)
class CovDrop(Trust):
    """PPO's clip without a random share of the tokens whose covariance of A and logp is high (Clip-Cov, 2505.22317).

    fraction of all valid tokens, drawn among those with cov_low < cov < cov_high that the clip has not stopped already.
    The draw is keyed by the seed and the token's own numbers: the order of rows and the global generator do not matter.
    """

    option: ClassVar[str] = "cov_drop"
    homogeneous: ClassVar[bool] = False  # the bounds of the covariance are in A's units
    ordered: ClassVar[tuple[tuple[str, str], ...]] = (("cov_low", "cov_high"),)
    whole_batch: ClassVar[bool] = True
    low: float = param("clip_low", 0.2, "how far below 1 the ratio still counts when A < 0", low=0, bound=True)
    high: float = param("clip_high", 0.2, "how far above 1 the ratio still counts when A > 0", low=0, bound=True)
    fraction: float = param("fraction", 2e-4, "share of the tokens that is dropped", above=0, high=1)
    cov_low: float = param("cov_low", 1.0, "covariance above which a token may be dropped")
    cov_high: float = param("cov_high", 5.0, "covariance above which it may not", bound=True)
    seed: int = param("seed", 0, "decides which candidates are dropped")

    def value(self, at: Tokens) -> Tensor:
        clipped = printed(at, 1 - self.low, 1 + self.high)
        if at.batch is None:
            return clipped
        cov, ratio = covariance(at), at.ratio.detach()
        free = torch.where(at.advantage >= 0, ratio <= 1 + self.high, ratio >= 1 - self.low)  # the clip lets it through
        candidates = at.mask & free & (cov > self.cov_low) & (cov < self.cov_high)
        key = torch.where(candidates, _key(at, self.seed), torch.full_like(at.denominator_logp.double(), -1.0))
        chosen = key.flatten().topk(min(_how_many(self.fraction, at), int(candidates.sum()))).indices
        drop = torch.zeros_like(at.mask.flatten()).index_fill(0, chosen, True).view_as(at.mask)
        return torch.where(drop, torch.zeros_like(clipped), clipped)

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return 1 - self.low, 1 + self.high

    def weight(self, at: Tokens) -> Tensor:
        gone = stopped(at, 1 - self.low, 1 + self.high)
        if at.batch is None:
            return unless(gone, at)
        cov = _multiplied_out(at)
        left = at.mask & ~(gone | (cov <= self.cov_low) | (cov >= self.cov_high))
        rows = left.flatten().nonzero()[:, 0]
        drawn = rows[_key(at, self.seed).flatten()[rows].argsort(descending=True)[: _how_many(self.fraction, at)]]
        gone = gone.expand_as(at.mask).flatten().index_fill(0, drawn, True).view_as(at.mask)
        return unless(gone, at)

    def formula(self) -> str:
        lo, hi = number(max(1 - self.low, 0)), number(1 + self.high)
        free = f"not (A ≥ 0 and r > {hi} or A < 0 and r < {lo})"
        some = f"{number(self.cov_low)} < cov(A, log π_θ(y_t)) < {number(self.cov_high)} and {free}"
        drawn = f"drawn({number(self.fraction)}, {some}, {self.seed}, A, log π_old(y_t))"
        return f"{Clip(self.low, self.high).formula()}·(1 − {drawn})"

    def code(self) -> list[str]:
        return [
            *Clip(self.low, self.high).code(),
            *_cov_code(),
            f"stopped = ((A >= 0) & (r > 1 + {self.high})) | ((A < 0) & (r < 1 - {self.low}))",
            f"candidates = mask & ~stopped & (cov > {self.cov_low}) & (cov < {self.cov_high})",
            f"count = min(max(1, int({self.fraction} * int(n))), int(candidates.sum()))",
            f"key = 12.9898 * {self.seed} + 78.233 * denominator_logp.double() + 37.719 * A.double()",
            "key = torch.sin(key) * 43758.5453",
            "key = torch.where(candidates, key - key.floor(), -1.0)  # a random number of its own for each token",
            "drop = torch.zeros(mask.numel(), dtype=torch.bool)",
            "drop[key.flatten().topk(count).indices] = True",
            "loss = torch.where(drop.view_as(mask), 0.0, loss)",
        ]


def _key(at: Tokens, seed: int) -> Tensor:
    """A number in [0, 1) for each token, random for all purposes, from the seed, the old log-probability and A."""
    x = torch.sin(12.9898 * seed + 78.233 * at.denominator_logp.double() + 37.719 * at.advantage.double()) * 43758.5453
    return x - x.floor()


def _cov_code() -> list[str]:
    return [
        "n = mask.sum()",
        "a, l = A - A[mask].mean(), logp.detach() - logp.detach()[mask].mean()",
        "cov = a * l",
    ]


@dataclass(frozen=True)
class CovKL(Trust):
    """ℓ = -A·r, plus coef·|Δ| on the share of tokens with the highest covariance of A and logp (KL-Cov, 2505.22317)."""

    option: ClassVar[str] = "cov_kl"
    acts_alone: ClassVar[bool] = True
    token_only: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = True
    fraction: float = param("fraction", 2e-4, "share of the tokens that is penalized", above=0, high=1)
    coef: float = param("coef", 1.0, "coefficient of the penalty |log r|", low=0)

    @property
    def homogeneous(self) -> bool:  # type: ignore[override]
        return self.coef == 0

    def value(self, at: Tokens) -> Tensor:
        plain = -at.advantage * at.ratio
        if at.batch is None:  # a single token, not among the chosen
            return plain
        cov = torch.where(at.mask, covariance(at), torch.full_like(at.advantage, -torch.inf))
        top = cov.flatten().sort(descending=True, stable=True).indices[: _how_many(self.fraction, at)]
        chosen = torch.zeros_like(at.mask.flatten()).index_fill(0, top, True).view_as(at.mask) & at.mask
        # the ratio's log, so that the gradient runs through it and stops at the same bound
        return plain + self.coef * torch.where(chosen, at.ratio.log().abs(), torch.zeros_like(at.ratio))

    def slope(self, at: Tokens) -> Tensor:
        return torch.where(at.advantage == 0, self._pull(at), -self.weight(at) * at.advantage)

    def _pull(self, at: Tokens) -> Tensor:
        """The slope of the penalty by hand: ±coef on the chosen."""
        pull = self.coef * at.ratio.log().sign()
        if at.batch is None:
            return torch.zeros_like(pull)
        falling = torch.where(at.mask, -_multiplied_out(at), torch.full_like(at.advantage, torch.inf))
        first = falling.flatten().argsort(stable=True)[: _how_many(self.fraction, at)]
        others = torch.ones_like(at.mask.flatten()).index_fill(0, first, False).view_as(at.mask) | ~at.mask
        return torch.where(others, torch.zeros_like(pull), pull)

    def weight(self, at: Tokens) -> Tensor:
        none = torch.zeros_like(at.ratio)
        return at.ratio - torch.where(at.advantage == 0, none, self._pull(at) / at.advantage)

    def formula(self) -> str:
        return f"r·A − {number(self.coef)}·|log r|·top({number(self.fraction)}, cov(A, log π_θ(y_t)))"

    def code(self) -> list[str]:
        return [
            *_cov_code(),
            "cov = torch.where(mask, cov, -torch.inf)",
            f"top = cov.flatten().sort(descending=True, stable=True).indices[: max(1, int({self.fraction} * int(n)))]",
            "chosen = torch.zeros(mask.numel(), dtype=torch.bool)",
            "chosen[top] = True",
            f"loss = -r * A + {self.coef} * (logp - denominator_logp).abs() * chosen.view_as(mask)",
        ]


@dataclass(frozen=True)
class Luffy(Trust):
    """On-policy completions: ℓ = -A·r; completions of another policy: ℓ = -A·p/(p + shape) (LUFFY, arXiv:2504.14945).

    The other policy's probability is taken as 1, as in the authors' code. Batch.off_policy marks its completions.
    """

    option: ClassVar[str] = "luffy"
    through: ClassVar[str] = "logp"
    token_only: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"off_policy"})
    shape: float = param("shape", 0.1, "how strongly rare tokens of the other policy count", above=0)

    def value(self, at: Tokens) -> Tensor:
        if at.batch is None:
            return -at.advantage * at.ratio
        p, theirs = at.logp.exp(), at.batch.require("off_policy", "trust='luffy'")[:, None]
        return -at.advantage * torch.where(theirs, p / (p + self.shape), at.ratio)

    def weight(self, at: Tokens) -> Tensor:
        mine = torch.where(at.delta.abs() <= LOG_RATIO_BOUND, at.ratio, torch.zeros_like(at.ratio))
        if at.batch is None:
            return mine
        p, own = at.logp.exp(), ~at.batch.require("off_policy", "trust='luffy'")
        return torch.where(own[:, None], mine, p * self.shape / (p + self.shape) ** 2)

    def formula(self) -> str:
        return f"A·p where p = π_θ(y_t)/(π_θ(y_t) + {number(self.shape)}) if off_policy else r"

    def code(self) -> list[str]:
        return [
            "p = logp.exp()",
            f"loss = -A * torch.where(off_policy[:, None], p / (p + {self.shape}), r)",
        ]

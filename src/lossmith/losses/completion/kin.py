"""More of DPO's kin, as TRL 1.16.0 computes them: losses of both sides of a pair, and of pairs sorted over a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lossmith.losses.completion.completion_loss import Completions
from lossmith.losses.completion.pairs import Paired, labels_param, pairs_param
from lossmith.losses.piece import number, param

__all__ = ["AOT", "EXO", "NCA", "AOTUnpaired", "APODown", "APOZero", "BCOPair", "SPPOHard"]


def _beta() -> float:
    beta: float = param("beta", 0.1, "strength of the pull to the reference", above=0)
    return beta


def _sigma_slope(x: Tensor) -> Tensor:
    """σ'(x)."""
    s = torch.sigmoid(x)
    return s * (1 - s)


class _Sides(Paired):
    """A loss f(Λ_w, Λ_l) of both sides, which is no function of their difference alone."""

    beta: float

    def of_sides(self, w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        """f, of each pair."""
        raise NotImplementedError

    def of_sides_slopes(self, w: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        """(∂f/∂w, ∂f/∂l)."""
        raise NotImplementedError

    def sides_text(self, w: str, l: str) -> str:  # noqa: E741
        """f of these two."""
        raise NotImplementedError

    def sides_code(self) -> str:
        """f, in code, from x and y."""
        raise NotImplementedError

    def value(self, at: Completions, units: float) -> Tensor:
        winners, losers = self.find_pairs(at)
        w, l = at.log_ratio[winners], at.log_ratio[losers]  # noqa: E741
        if self.labels == "reward":
            return self.of_sides(w, l).sum() / (units or 1)
        p = self._probability(at, winners)
        each = p * self.of_sides(w, l) + (1 - p) * self.of_sides(l, w)
        return (each * self._weight(at, winners)).sum() / (units or 1)

    def slope(self, at: Completions, units: float) -> Tensor:
        winners, losers = self.find_pairs(at)
        w, l = at.log_ratio[winners], at.log_ratio[losers]  # noqa: E741
        dw, dl = self.of_sides_slopes(w, l)
        if self.labels == "given":
            p, (dl_flipped, dw_flipped) = self._probability(at, winners), self.of_sides_slopes(l, w)
            weight = self._weight(at, winners)
            dw, dl = (
                weight * (p * straight + (1 - p) * flipped)
                for straight, flipped in ((dw, dw_flipped), (dl, dl_flipped))
            )
        zero = torch.zeros_like(at.log_ratio)
        return zero.index_add(0, winners, dw).index_add(0, losers, dl) / (units or 1)

    def _each_text(self) -> str:
        straight, flipped = self.sides_text("Λ_w", "Λ_l"), self.sides_text("Λ_l", "Λ_w")
        return straight if self._certain() else f"q·({straight}) + (1 − q)·({flipped})"

    def _mean_code(self) -> list[str]:
        lines = ["x, y = Lam[w], Lam[l]"]
        if self._certain():
            return [*lines, f"return ({self.sides_code()}).sum() / max(len(w), 1)"]
        return [
            *lines,
            f"f = lambda x, y: {self.sides_code()}",
            "p, u = pair_probability[w], pair_weight[w]",
            "return (u * (p * f(x, y) + (1 - p) * f(y, x))).sum() / (u.sum() if len(w) else 1)",
        ]


@dataclass(frozen=True)
class APOZero(_Sides):
    """1 - σ(βΛ_w) + σ(βΛ_l): winners up, losers down (APO-zero, arXiv:2408.06266, eq. 7)."""

    option: ClassVar[str] = "apo_zero"
    beta: float = _beta()
    pairs: str = pairs_param()
    labels: str = labels_param()

    def of_sides(self, w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return 1 - torch.sigmoid(self.beta * w) + torch.sigmoid(self.beta * l)

    def of_sides_slopes(self, w: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        return -self.beta * _sigma_slope(self.beta * w), self.beta * _sigma_slope(self.beta * l)

    def sides_text(self, w: str, l: str) -> str:  # noqa: E741
        b = number(self.beta)
        return f"1 − σ({b}·{w}) + σ({b}·{l})"

    def sides_code(self) -> str:
        return f"1 - torch.sigmoid({self.beta} * x) + torch.sigmoid({self.beta} * y)"


@dataclass(frozen=True)
class APODown(_Sides):
    """σ(βΛ_w) + 1 - σ(β(Λ_w - Λ_l)): both down, losers more (APO-down, arXiv:2408.06266, eq. 8)."""

    option: ClassVar[str] = "apo_down"
    beta: float = _beta()
    pairs: str = pairs_param()
    labels: str = labels_param()

    def of_sides(self, w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return torch.sigmoid(self.beta * w) + 1 - torch.sigmoid(self.beta * (w - l))

    def of_sides_slopes(self, w: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        apart = self.beta * _sigma_slope(self.beta * (w - l))
        return self.beta * _sigma_slope(self.beta * w) - apart, apart

    def sides_text(self, w: str, l: str) -> str:  # noqa: E741
        b = number(self.beta)
        return f"σ({b}·{w}) + 1 − σ({b}·({w} − {l}))"

    def sides_code(self) -> str:
        return f"torch.sigmoid({self.beta} * x) + 1 - torch.sigmoid({self.beta} * (x - y))"


@dataclass(frozen=True)
class NCA(_Sides):
    """-ln σ(βΛ_w) - ½ ln σ(-βΛ_w) - ½ ln σ(-βΛ_l): absolute likelihoods, not differences (NCA, arXiv:2402.05369)."""

    option: ClassVar[str] = "nca"
    beta: float = _beta()
    pairs: str = pairs_param()
    labels: str = labels_param()

    def of_sides(self, w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        up, down = self.beta * w, self.beta * l
        return -logsigmoid(up) - 0.5 * logsigmoid(-up) - 0.5 * logsigmoid(-down)

    def of_sides_slopes(self, w: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        up, down = self.beta * w, self.beta * l
        return self.beta * (0.5 * torch.sigmoid(up) - torch.sigmoid(-up)), 0.5 * self.beta * torch.sigmoid(down)

    def sides_text(self, w: str, l: str) -> str:  # noqa: E741
        b = number(self.beta)
        return f"−ln σ({b}·{w}) − 0.5·ln σ(−{b}·{w}) − 0.5·ln σ(−{b}·{l})"

    def sides_code(self) -> str:
        ls, b = "torch.nn.functional.logsigmoid", self.beta
        return f"-{ls}({b} * x) - 0.5 * {ls}(-{b} * x) - 0.5 * {ls}(-{b} * y)"


@dataclass(frozen=True)
class BCOPair(_Sides):
    """-ln σ(βΛ_w) - ln σ(-βΛ_l): a classifier of winners and losers (BCO, arXiv:2404.04656; no reward shift)."""

    option: ClassVar[str] = "bco_pair"
    beta: float = _beta()
    pairs: str = pairs_param()
    labels: str = labels_param()

    def of_sides(self, w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return -logsigmoid(self.beta * w) - logsigmoid(-self.beta * l)

    def of_sides_slopes(self, w: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        return -self.beta * torch.sigmoid(-self.beta * w), self.beta * torch.sigmoid(self.beta * l)

    def sides_text(self, w: str, l: str) -> str:  # noqa: E741
        b = number(self.beta)
        return f"−ln σ({b}·{w}) − ln σ(−{b}·{l})"

    def sides_code(self) -> str:
        ls, b = "torch.nn.functional.logsigmoid", self.beta
        return f"-{ls}({b} * x) - {ls}(-{b} * y)"


@dataclass(frozen=True)
class SPPOHard(_Sides):
    """(Λ_w - 1/(2β))² + (Λ_l + 1/(2β))²: SPPO on pairs whose winner wins for sure (arXiv:2405.00675, eq. 4.7)."""

    option: ClassVar[str] = "sppo_hard"
    beta: float = param("beta", 0.1, "1/(2·beta) is the wanted log-ratio of a winner", above=0)
    pairs: str = pairs_param()
    labels: str = labels_param()

    def of_sides(self, w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return (w - 0.5 / self.beta) ** 2 + (l + 0.5 / self.beta) ** 2

    def of_sides_slopes(self, w: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        return 2 * (w - 0.5 / self.beta), 2 * (l + 0.5 / self.beta)

    def sides_text(self, w: str, l: str) -> str:  # noqa: E741
        t = number(0.5 / self.beta)
        return f"({w} − {t})² + ({l} + {t})²"

    def sides_code(self) -> str:
        return f"(x - 0.5 / {self.beta}) ** 2 + (y + 0.5 / {self.beta}) ** 2"


@dataclass(frozen=True)
class EXO(Paired):
    """KL of the policy's preference q = σ(βd) from the labels': q ln(q/(1 - ε)) + (1 - q) ln((1 - q)/ε) (EXO,
    arXiv:2402.00856, eq. 16).
    """

    option: ClassVar[str] = "exo"
    beta: float = _beta()
    wrong: float = param("exo_epsilon", 1e-3, "probability that a pair's label is wrong", above=0, high=0.5)
    pairs: str = pairs_param()
    labels: str = labels_param()

    def of_margin(self, margin: Tensor) -> Tensor:
        x = self.beta * margin
        up = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-self.wrong))
        return up + torch.sigmoid(-x) * (logsigmoid(-x) - math.log(self.wrong))

    def of_margin_slope(self, margin: Tensor) -> Tensor:
        x = self.beta * margin
        return self.beta * _sigma_slope(x) * (x + math.log(self.wrong) - math.log1p(-self.wrong))

    def margin_text(self, margin: str) -> str:
        b, e, keep = number(self.beta), number(self.wrong), number(1 - self.wrong)
        up, down = f"σ({b}·({margin}))", f"σ(−{b}·({margin}))"
        return f"{up}·(ln {up} − ln {keep}) + {down}·(ln {down} − ln {e})"

    def margin_code(self) -> str:
        b, ls = self.beta, "torch.nn.functional.logsigmoid"
        keep, wrong = math.log1p(-self.wrong), math.log(self.wrong)
        return (
            f"torch.sigmoid({b} * d) * ({ls}({b} * d) - {keep}) + torch.sigmoid(-{b} * d) * ({ls}(-{b} * d) - {wrong})"
        )


class _Ordered(Paired):
    """-ln σ(β(a_(k) - b_(k))), a and b each sorted over all pairs of the batch: one distribution above the other."""

    coupling: ClassVar[str] = "batch"
    compares: ClassVar[str] = "group"  # pairs are of one prompt; only their order is the batch's
    labels: ClassVar[str] = "reward"  # type: ignore[misc]
    beta: float
    sides_text: ClassVar[tuple[str, str]]  # a and b of a pair

    def sides(self, at: Completions, winners: Tensor, losers: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of each pair."""
        raise NotImplementedError

    def value(self, at: Completions, units: float) -> Tensor:
        a, b = self.sides(at, *self.find_pairs(at))
        return -logsigmoid(self.beta * (a.sort().values - b.sort().values)).sum() / (units or 1)

    def ordered_slopes(self, at: Completions, winners: Tensor, losers: Tensor) -> tuple[Tensor, Tensor]:
        """(dL/da, dL/db) of each pair, before the mean."""
        a, b = self.sides(at, winners, losers)
        first, second = a.argsort(), b.argsort()
        slope = -self.beta * torch.sigmoid(-self.beta * (a[first] - b[second]))
        zero = torch.zeros_like(a)
        return zero.index_copy(0, first, slope), zero.index_copy(0, second, -slope)

    def _each_text(self) -> str:
        a, b = self.sides_text
        return f"−ln σ({number(self.beta)}·({a} − matched_P({a}, {b})))"


@dataclass(frozen=True)
class AOT(_Ordered):
    """The policy's margins above the reference's, as distributions: -ln σ(β(m_(k) - m_ref,(k))), both sorted over the
    batch (AOT paired, arXiv:2406.05882).
    """

    option: ClassVar[str] = "aot"
    sides_text: ClassVar[tuple[str, str]] = ("(X_w − X_l)", "(Y_w − Y_l)")
    beta: float = _beta()
    pairs: str = pairs_param()

    def sides(self, at: Completions, winners: Tensor, losers: Tensor) -> tuple[Tensor, Tensor]:
        ref = at.batch.require("ref_logp", "aot").detach().sum(1)
        policy = at.log_ratio + ref
        return policy[winners] - policy[losers], ref[winners] - ref[losers]

    def slope(self, at: Completions, units: float) -> Tensor:
        winners, losers = self.find_pairs(at)
        each = self.ordered_slopes(at, winners, losers)[0] / (units or 1)
        return torch.zeros_like(at.log_ratio).index_add(0, winners, each).index_add(0, losers, -each)

    def formula(self) -> str:
        return f"{super().formula()}; X = Σ_t log π_θ(y_t); Y = Σ_t log π_ref(y_t)"

    def _mean_code(self) -> list[str]:
        return [
            "ref = (ref_logp * mask).sum(1)",
            "a, b = (Lam + ref)[w] - (Lam + ref)[l], ref[w] - ref[l]",
            "d = a.sort().values - b.sort().values",
            f"return -torch.nn.functional.logsigmoid({self.beta} * d).sum() / max(len(w), 1)",
        ]


@dataclass(frozen=True)
class AOTUnpaired(_Ordered):
    """Winners' log-ratios above the losers', as distributions: -ln σ(β(Λ_w,(k) - Λ_l,(k))), both sorted over the batch
    (AOT unpaired, arXiv:2406.05882).
    """

    option: ClassVar[str] = "aot_unpaired"
    sides_text: ClassVar[tuple[str, str]] = ("Λ_w", "Λ_l")
    beta: float = _beta()
    pairs: str = pairs_param()

    def sides(self, at: Completions, winners: Tensor, losers: Tensor) -> tuple[Tensor, Tensor]:
        return at.log_ratio[winners], at.log_ratio[losers]

    def slope(self, at: Completions, units: float) -> Tensor:
        winners, losers = self.find_pairs(at)
        up, down = (x / (units or 1) for x in self.ordered_slopes(at, winners, losers))
        return torch.zeros_like(at.log_ratio).index_add(0, winners, up).index_add(0, losers, down)

    def _mean_code(self) -> list[str]:
        return [
            "d = Lam[w].sort().values - Lam[l].sort().values",
            f"return -torch.nn.functional.logsigmoid({self.beta} * d).sum() / max(len(w), 1)",
        ]

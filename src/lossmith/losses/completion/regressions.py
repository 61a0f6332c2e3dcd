"""The losses of whole completions: regressions of Λ on the reward; and the list of all, with those of preferences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.advantage import Groups
from lossmith.losses.completion import kin, preferences
from lossmith.losses.completion.completion_loss import Completions, CompletionTerm
from lossmith.losses.completion.pairs import GROUPED
from lossmith.losses.piece import number, options, param, pieces_in, symbol

__all__ = ["A2PO", "GVPO", "REAL", "SPPO", "TERMS", "TPO"]


@dataclass(frozen=True)
class A2PO(CompletionTerm):
    """(β2·Λ_i - (R_i - V*))², V* = β1 ln mean e^{R/β1} over the reference's completions (A*-PO, arXiv:2505.20686)."""

    option: ClassVar[str] = "a2po"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "reference_reward"})
    coupling: ClassVar[str] = "sequence"
    beta1: float = param("beta1", 0.5, "temperature of the optimal value V*", above=0)
    beta2: float = param("beta2", 1e-3, "factor of the log-ratio", above=0)

    def _target(self, at: Completions) -> Tensor:
        rewards = at.batch.require("reference_reward", "a2po").to(at.reward.dtype)
        mean = torch.logsumexp(rewards / self.beta1, 1) - math.log(rewards.shape[1])
        return at.reward - self.beta1 * mean

    def value(self, at: Completions, units: float) -> Tensor:
        return at.mean((self.beta2 * at.log_ratio - self._target(at)) ** 2, units)

    def slope(self, at: Completions, units: float) -> Tensor:
        return 2 * self.beta2 * (self.beta2 * at.log_ratio - self._target(at)) / max(units, 1)

    def formula(self) -> str:
        a, b = number(self.beta1), number(self.beta2)
        return f"mean_i(({b}·Λ_i − (R_i − V*))²) where V* = {a}·ln mean_ref(e^(R_ref/{a}))"

    def code(self) -> list[str]:
        return [
            f"V = {self.beta1} * torch.exp(reference_reward / {self.beta1}).mean(1).log()",
            f"return (({self.beta2} * Lam - (R - V)) ** 2).mean()",
        ]


@dataclass(frozen=True)
class GVPO(CompletionTerm):
    """½(β(Λ_i - sg mean_g Λ) - A_i)², A = R - mean_g(R): Σ over the group/(G - 1), mean over groups (arXiv:2504.19599).

    Λ is taken against the old policy; groups of one take no part. The mean over groups is ours: the recipe sums. The
    detached mean stops no gradient: what it would add sums to 0 over the group.
    """

    option: ClassVar[str] = "gvpo"
    anchor: ClassVar[str] = "old"
    needs: ClassVar[frozenset[str]] = GROUPED
    beta: float = param("beta", 0.1, "factor of the log-ratio", above=0)

    def units(self, at: Completions) -> float:
        groups = at.groups()
        return int(groups.index[at.live & ~groups.singleton].unique().numel())

    def _gap(self, at: Completions) -> tuple[Tensor, Tensor]:
        """(β(Λ - mean Λ) - A, 1/(G - 1) or 0), [N]."""
        groups = at.groups()
        mean = at.groups(at.log_ratio.detach()).mean
        share = torch.where(groups.singleton, 0.0, 1 / (groups.size - 1).clamp(min=1))
        return self.beta * (at.log_ratio - mean) - (at.reward - groups.mean), share

    def value(self, at: Completions, units: float) -> Tensor:
        gap, share = self._gap(at)
        return at.mean(0.5 * share * gap**2, units)

    def slope(self, at: Completions, units: float) -> Tensor:
        gap, share = self._gap(at)
        return self.beta * share * gap / max(units, 1)

    def formula(self) -> str:
        gap = f"{number(self.beta)}·(Λ_i − sg(mean_g(Λ_i))) − (R_i − mean_g(R_i))"
        return f"1/#g Σ_g 1/(|g| − 1) Σ_{{i∈g}} ½({gap})² where only g with |g| > 1"

    def code(self) -> list[str]:
        return [
            "total = 0.0",
            "several = [g for g in group.unique() if (group == g).sum() > 1]",
            "for g in several:",
            "    lam, r = Lam[group == g], R[group == g]",
            f"    gap = {self.beta} * (lam - lam.detach().mean()) - (r - r.mean())",
            "    total = total + 0.5 * (gap**2).sum() / (len(r) - 1)",
            "return total / max(len(several), 1) + 0.0 * Lam.sum()",
        ]


@dataclass(frozen=True)
class SPPO(CompletionTerm):
    """(Λ_i - eta·R_i)², mean over completions (SPPO, arXiv:2405.00675); the paper's R is a centered win rate, P - ½."""

    option: ClassVar[str] = "sppo"
    anchor: ClassVar[str] = "old"
    needs: ClassVar[frozenset[str]] = frozenset({"reward"})
    coupling: ClassVar[str] = "sequence"
    eta: float | None = param("eta", None, "factor of the reward", above=0, required=True)

    def value(self, at: Completions, units: float) -> Tensor:
        return at.mean((at.log_ratio - self.given("eta") * at.reward) ** 2, units)

    def slope(self, at: Completions, units: float) -> Tensor:
        return 2 * (at.log_ratio - self.given("eta") * at.reward) / max(units, 1)

    def formula(self) -> str:
        return f"mean_i((Λ_i − {symbol(self.eta, 'η')}·R_i)²)"

    def code(self) -> list[str]:
        return [f"return ((Lam - {self.eta} * R) ** 2).mean()"]


@dataclass(frozen=True)
class REAL(CompletionTerm):
    """Good against bad completions of a group by their mean log-ratio s = Λ/T (REAL, arXiv:2602.05630).

    log(1 + Σ_{A<=0} e^{s/tau}) + log(1 + Σ_{A>0} e^{-s/tau}), A = R - mean_g(R), summed over groups that hold both and
    divided by the number of all groups.
    """

    option: ClassVar[str] = "real"
    anchor: ClassVar[str] = "old"
    needs: ClassVar[frozenset[str]] = GROUPED
    tau: float = param("tau", 0.5, "temperature", above=0)

    def units(self, at: Completions) -> float:
        return int(at.groups().index[at.live].unique().numel())

    def _parts(self, at: Completions) -> tuple[Tensor, Tensor, Groups, Groups]:
        """(exponent of each row, sign of its side, the bad and the good rows of mixed groups)."""
        groups = at.groups()
        good, mixed = (groups.reward > groups.mean) & ~groups.constant, at.live & ~groups.constant
        sign = torch.where(good, -torch.ones_like(at.reward), torch.ones_like(at.reward))
        x = sign * at.log_ratio / (at.lengths * self.tau)
        return x, sign, Groups(groups.index, mixed & ~good, x), Groups(groups.index, mixed & good, x)

    def value(self, at: Completions, units: float) -> Tensor:
        x, _, bad, good = self._parts(at)
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for side in (bad, good):
            each = torch.log1p(side.total(x.exp()))  # the same number on each row of a group
            first = side.first_where(side.live)
            total = total + torch.where(first, each, torch.zeros_like(each)).sum()
        return total / max(units, 1)

    def slope(self, at: Completions, units: float) -> Tensor:
        x, sign, bad, good = self._parts(at)
        slope = torch.zeros_like(x)
        for side in (bad, good):
            share = x.exp() / (1 + side.total(x.exp()))
            slope = slope + torch.where(side.live, sign * share / (at.lengths * self.tau), torch.zeros_like(x))
        return slope / max(units, 1)

    def formula(self) -> str:
        t = number(self.tau)
        sides = (
            f"ln(1 + Σ_{{i∈g}} [{side}]·e^({sign}Λ_i/({t}·T_i)))" for side, sign in (("A ≤ 0", ""), ("A > 0", "−"))
        )
        return f"1/#g Σ_g [max_g(R) > min_g(R)]·({' + '.join(sides)}) where A = R_i − mean_g(R_i)"

    def code(self) -> list[str]:
        return [
            f"total, s = 0.0 * Lam.sum(), Lam / (T * {self.tau})",
            "for g in group.unique():",
            "    x, r = s[group == g], R[group == g]",
            "    if r.max() > r.min():",
            "        good = r > r.mean()",
            "        total = total + torch.log(1 + x[~good].exp().sum()) + torch.log(1 + (-x[good]).exp().sum())",
            "return total / len(group.unique())",
        ]


@dataclass(frozen=True)
class TPO(CompletionTerm):
    """-Σ_{i∈g} q_i·log p_i, mean over groups: p the policy's and o the old policy's probabilities among the group's
    completions, q ∝ o·e^{u/eta}, u = (R - mean_g)/std0_g, and 0 where all rewards are equal (TPO, arXiv:2604.06159).
    """

    option: ClassVar[str] = "tpo"
    anchor: ClassVar[str] = "old"
    needs: ClassVar[frozenset[str]] = GROUPED
    eta: float = param("eta", 1.0, "temperature of the target", above=0)

    def units(self, at: Completions) -> float:
        return int(at.groups().index[at.live].unique().numel())

    def _old(self, at: Completions) -> Tensor:
        """Σ_t log π_old [N]."""
        return at.batch.old("tpo").sum(1)

    def _share(self, at: Completions, score: Tensor) -> Tensor:
        """log of softmax over each group, [N]."""
        groups = at.groups(score)
        below = score - groups.largest.detach()
        return below - groups.total(below.exp()).clamp(min=1e-300).log()

    def _target(self, at: Completions) -> Tensor:
        groups = at.groups()
        flat = groups.constant
        u = torch.where(flat, 0.0, (groups.reward - groups.mean) / torch.where(flat, 1.0, groups.std(ddof=0)))
        return self._share(at, self._old(at) + u / self.eta).exp()

    def value(self, at: Completions, units: float) -> Tensor:
        return -at.mean(self._target(at) * self._share(at, self._old(at) + at.log_ratio), units)

    def slope(self, at: Completions, units: float) -> Tensor:
        now = (self._old(at) + at.log_ratio).exp()
        return (now / at.groups(now).total(now).clamp(min=1e-300) - self._target(at)) / max(units, 1)

    def formula(self) -> str:
        u = "u = (R − mean_g(R))/std0_g(R)"
        target = f"q = e^(Y + u/{number(self.eta)})/Σ_{{i∈g}} e^(Y + u/{number(self.eta)})"
        share = "Y + Λ_i − ln(Σ_{i∈g} e^(Y + Λ_i))"
        return f"−1/#g Σ_g Σ_{{i∈g}} q·({share}) where {target}; {u}; Y = Σ_t log π_old(y_t)"

    def code(self) -> list[str]:
        return [
            "total, old = 0.0 * Lam.sum(), (old_logp * mask).sum(1)",
            "for g in group.unique():",
            "    o, r = old[group == g], R[group == g]",
            "    std = r.std(correction=0)",
            "    u = (r - r.mean()) / torch.where(std > 0, std, 1.0)",
            f"    q = torch.softmax(o + u / {self.eta}, 0)",
            "    total = total - (q * torch.log_softmax(o + Lam[group == g], 0)).sum()",
            "return total / len(group.unique())",
        ]


TERMS: dict[str, type[CompletionTerm]] = options(*pieces_in(CompletionTerm, vars(preferences), vars(kin), globals()))

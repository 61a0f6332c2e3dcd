"""A loss of pairs within a group: the completion of the higher reward, w, against another, l.

Every one is a function f of the margin d = s_w - s_l of some score s of a completion (its log-ratio Λ, unless the loss
says otherwise), the mean over pairs. What is known of the pairs comes in one of two ways:

reward  the higher reward wins, for sure, and every pair weighs 1
given   Batch.pair_probability p and Batch.pair_weight u, at the winner's row: p·f(d) + (1 - p)·f(-d), weighed by u
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.advantage import Groups
from lossmith.losses.completion.completion_loss import Completions, CompletionTerm
from lossmith.losses.piece import number, param

__all__ = ["GIVEN", "GROUPED", "Paired", "labels_param", "pairs_param"]

GROUPED = frozenset({"reward", "group"})
GIVEN = frozenset({"pair_probability", "pair_weight"})
_SAME = "same = group[:, None] == group"


def pairs_param(default: str = "all") -> str:
    choices = ("best_worst", "all")
    chosen: str = param("pairs", default, "which pairs of a group", choices=choices)
    return chosen


def labels_param() -> str:
    doc = "who won a pair: the higher reward for sure, or with the pair's given probability and weight"
    chosen: str = param("labels", "reward", doc, choices=("reward", "given"))
    return chosen


class Paired(CompletionTerm):
    """A loss of the margin of pairs within a group, the mean over pairs."""

    needs: ClassVar[frozenset[str]] = GROUPED
    pairs: str
    labels: str
    label_smoothing: float = 0.0  # probability that a pair's label is wrong

    @property
    def reads(self) -> frozenset[str]:
        return self.needs | (GIVEN if self.labels == "given" else frozenset())

    # -- what a loss says -------------------------------------------------------------------------------------------

    def of_margin(self, margin: Tensor) -> Tensor:
        """f(d), of each pair."""
        raise NotImplementedError

    def of_margin_slope(self, margin: Tensor) -> Tensor:
        """f'(d)."""
        raise NotImplementedError

    def score(self, at: Completions) -> Tensor:
        """s [N], what the margin is the difference of."""
        return at.log_ratio

    def score_slope(self, at: Completions) -> Tensor:
        """ds/dΛ [N]."""
        return torch.ones_like(at.log_ratio)

    def imitation(self, at: Completions) -> tuple[Tensor, Tensor] | None:
        """What is added for each winner, and its derivative in Λ, [N]; None for nothing."""
        return None

    def margin_text(self, margin: str) -> str:
        """f of this margin."""
        raise NotImplementedError

    def score_text(self) -> str:
        """s of a completion i."""
        return "Λ_i"

    def imitation_text(self) -> str:
        """What is added for a winner w, with its sign."""
        return ""

    def margin_code(self) -> str:
        """f(d), in code."""
        raise NotImplementedError

    def score_code(self) -> str:
        """s, in code."""
        return "Lam"

    def imitation_code(self) -> str:
        """What is added for each winner, in code, from w."""
        return ""

    # -- what follows ------------------------------------------------------------------------------------------------

    def find_pairs(self, at: Completions) -> tuple[Tensor, Tensor]:
        """Row numbers of winners and losers; equal rewards make no pair."""
        groups = at.groups()
        if self.pairs == "all":
            same = (groups.index[:, None] == groups.index) & at.live[:, None] & at.live
            winners, losers = (same & (at.reward[:, None] > at.reward)).nonzero(as_tuple=True)
            return winners, losers
        best = groups.first_where(groups.reward == groups.largest)
        worst = groups.first_where(groups.reward == -Groups.of(-at.reward, groups.index, at.live).largest)
        mixed = ~groups.constant
        winners, losers = (best & mixed).nonzero()[:, 0], (worst & mixed).nonzero()[:, 0]
        return winners[groups.index[winners].argsort()], losers[groups.index[losers].argsort()]

    def units(self, at: Completions) -> float:
        """Pairs, or the sum of their given weights."""
        winners = self.find_pairs(at)[0]
        return len(winners) if self.labels == "reward" else float(self._weight(at, winners).sum())

    def _weight(self, at: Completions, winners: Tensor) -> Tensor:
        return at.batch.require("pair_weight", "labels='given'")[winners].to(at.log_ratio.dtype)

    def _certain(self) -> bool:
        return self.labels == "reward" and self.label_smoothing == 0

    def _probability(self, at: Completions, winners: Tensor) -> Tensor:
        """That the winner is better, as far as the label can be trusted. [pairs]"""
        if self.labels == "reward":
            p = torch.ones_like(at.log_ratio)[winners].detach()
        else:
            p = at.batch.require("pair_probability", "labels='given'")[winners].to(at.log_ratio.dtype)
        return p * (1 - self.label_smoothing) + (1 - p) * self.label_smoothing

    def _each(self, at: Completions, winners: Tensor, margin: Tensor) -> Tensor:
        if self._certain():
            return self.of_margin(margin)
        p = self._probability(at, winners)
        return p * self.of_margin(margin) + (1 - p) * self.of_margin(-margin)

    def _each_slope(self, at: Completions, winners: Tensor, margin: Tensor) -> Tensor:
        if self._certain():
            return self.of_margin_slope(margin)
        p = self._probability(at, winners)
        return p * self.of_margin_slope(margin) - (1 - p) * self.of_margin_slope(-margin)

    def value(self, at: Completions, units: float) -> Tensor:
        (winners, losers), score = self.find_pairs(at), self.score(at)
        each = self._each(at, winners, score[winners] - score[losers])
        extra = self.imitation(at)
        each = each if extra is None else each + extra[0][winners]
        each = each if self.labels == "reward" else each * self._weight(at, winners)
        return each.sum() / (units or 1)

    def slope(self, at: Completions, units: float) -> Tensor:
        (winners, losers), score, inner = self.find_pairs(at), self.score(at), self.score_slope(at)
        weight = torch.ones_like(score)[winners] if self.labels == "reward" else self._weight(at, winners)
        share = weight / (units or 1)
        per_pair = share * self._each_slope(at, winners, score[winners] - score[losers])
        zero = torch.zeros_like(at.log_ratio)
        slope = inner * zero.index_add(0, winners, per_pair).index_add(0, losers, -per_pair)
        extra = self.imitation(at)
        return slope if extra is None else slope.index_add(0, winners, share * extra[1][winners])

    def compute_metrics(self, at: Completions) -> dict[str, float]:
        """margin: mean s_w - s_l; accuracy: share of pairs with s_w > s_l, ties one half; log-ratios of both sides."""
        winners, losers = self.find_pairs(at)
        if not len(winners):
            return {}
        score = self.score(at)
        margin = score[winners] - score[losers]
        logp = at.batch.require("logp", "a paired loss").sum(1)
        return {
            "margin": float(margin.mean()),
            "accuracy": float((margin > 0).double().mean() + 0.5 * (margin == 0).double().mean()),
            "chosen_log_ratio": float(at.log_ratio[winners].mean()),
            "rejected_log_ratio": float(at.log_ratio[losers].mean()),
            "chosen_logp": float(logp[winners].mean()),
        }

    def formula(self) -> str:
        weighed = self.labels == "given"
        over, where = ("(Σ_P u_w·({})) / (Σ_P u_w)" if weighed else "mean_P({})"), f"P = {self._pairs_text()}"
        return f"{over.format(self._each_text())} where {where}" + (f"; {self._label_text()}" if weighed else "")

    def _each_text(self) -> str:
        won, lost = (self.score_text().replace("_i", f"_{k}") for k in "wl")
        straight, flipped = (self.margin_text(d) for d in (f"{won} − {lost}", f"{lost} − {won}"))
        extra = self.imitation_text()
        if self._certain():
            return straight + extra
        if self.labels == "given":
            return f"q·({straight}) + (1 − q)·({flipped}){extra}"
        return f"{number(1 - self.label_smoothing)}·({straight}) + {number(self.label_smoothing)}·({flipped}){extra}"

    def _label_text(self) -> str:
        return "q = p_w" + (f" + {number(self.label_smoothing)}·(1 − 2·p_w)" if self.label_smoothing else "")

    def _pairs_text(self) -> str:
        if self.pairs == "all":
            return "{(w, l): g_w = g_l, R_w > R_l}"
        return "{(w, l): g_w = g_l, w = argmax_g(R), l = argmin_g(R), R_w > R_l}"

    def code(self) -> list[str]:
        if self.pairs == "all":
            choose = [_SAME, "w, l = (same & (R[:, None] > R)).nonzero(as_tuple=True)"]
        else:
            choose = [
                "pairs = []",
                "for g in group.unique():",
                "    i = (group == g).nonzero()[:, 0]",
                "    if R[i].max() > R[i].min(): pairs.append((i[R[i].argmax()], i[R[i].argmin()]))",
                "w, l = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T",
            ]
        return [*choose, *self._mean_code()]

    def _mean_code(self) -> list[str]:
        score, extra = self.score_code(), self.imitation_code()
        lines = [f"s = {score}", "d = s[w] - s[l]"] if score != "Lam" else ["d = Lam[w] - Lam[l]"]
        if self._certain():
            return [*lines, f"return ({self.margin_code()}{extra}).sum() / max(len(w), 1)"]
        lines.append(f"f = lambda d: {self.margin_code()}")
        if self.labels == "reward":
            e = self.label_smoothing
            return [*lines, f"return ((1 - {e}) * f(d) + {e} * f(-d){extra}).sum() / max(len(w), 1)"]
        lines.append("p, u = pair_probability[w], pair_weight[w]")
        if self.label_smoothing:
            lines.append(f"p = p + {self.label_smoothing} * (1 - 2 * p)")
        return [*lines, f"return (u * (p * f(d) + (1 - p) * f(-d){extra})).sum() / (u.sum() if len(w) else 1)"]

"""Losses of preferences: DPO and its kin, on given pairs or on the policy's own completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lossmith.errors import LossError
from lossmith.losses.completion.completion_loss import Completions, CompletionTerm
from lossmith.losses.completion.pairs import Paired, labels_param, pairs_param
from lossmith.losses.piece import number, param

__all__ = ["CPO", "KTO", "ORPO", "Hinge", "OnlineDPO", "OnlineIPO", "OnlineKTO", "RobustDPO", "SLiC", "SimPO"]

_ODDS_LIMIT = -1e-6  # a completion of probability 1 has infinite odds: its mean log-probability is taken no closer to 0


def _below_half(name: str, share: float) -> None:
    if share >= 0.5:
        raise LossError(f"{name} is {share}, but must be below 0.5: labels that are wrong half the time say nothing.")


class _LogSigmoid(Paired):
    """f(d) = -ln σ(βd)."""

    beta: float

    def of_margin(self, margin: Tensor) -> Tensor:
        return -logsigmoid(self.beta * margin)

    def of_margin_slope(self, margin: Tensor) -> Tensor:
        return -self.beta * torch.sigmoid(-self.beta * margin)

    def margin_text(self, margin: str) -> str:
        return f"−ln σ({number(self.beta)}·({margin}))"

    def margin_code(self) -> str:
        return f"-torch.nn.functional.logsigmoid({self.beta} * d)"


@dataclass(frozen=True)
class OnlineDPO(_LogSigmoid):
    """-ln σ(β(Λ_w - Λ_l)) (DPO, arXiv:2305.18290, eq. 7; on the policy's own completions, arXiv:2402.04792).

    label_smoothing ε: (1 - ε)·f(d) + ε·f(-d), the conservative DPO (Mitchell 2023, ericmitchell.ai/cdpo.pdf, eq. 3).
    """

    option: ClassVar[str] = "online_dpo"
    beta: float = param("beta", 0.1, "strength of the pull to the reference", above=0)
    pairs: str = pairs_param("best_worst")
    labels: str = labels_param()
    label_smoothing: float = param("label_smoothing", 0.0, "probability that a pair's label is wrong", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _below_half("label_smoothing", self.label_smoothing)


@dataclass(frozen=True)
class RobustDPO(Paired):
    """[(1 - ε)·f(d) - ε·f(-d)] / (1 - 2ε), f(d) = -ln σ(βd) (robust DPO, arXiv:2403.00409).

    In expectation over labels that are flipped with probability ε it is DPO on the true ones.
    """

    option: ClassVar[str] = "robust_dpo"
    beta: float = param("beta", 0.1, "strength of the pull to the reference", above=0)
    pairs: str = pairs_param()
    labels: str = labels_param()
    flip: float = param("flip", 0.1, "probability that a pair's label was flipped", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _below_half("flip", self.flip)

    def of_margin(self, margin: Tensor) -> Tensor:
        e, x = self.flip, self.beta * margin
        return (e * logsigmoid(-x) - (1 - e) * logsigmoid(x)) / (1 - 2 * e)

    def of_margin_slope(self, margin: Tensor) -> Tensor:
        e, x = self.flip, self.beta * margin
        return -self.beta * ((1 - e) * torch.sigmoid(-x) + e * torch.sigmoid(x)) / (1 - 2 * e)

    def margin_text(self, margin: str) -> str:
        b, keep, flip, over = (number(x) for x in (self.beta, 1 - self.flip, self.flip, 1 - 2 * self.flip))
        return f"({flip}·ln σ(−{b}·({margin})) − {keep}·ln σ({b}·({margin}))) / {over}"

    def margin_code(self) -> str:
        e, ls = self.flip, "torch.nn.functional.logsigmoid"
        return f"({e} * {ls}(-{self.beta} * d) - (1 - {e}) * {ls}({self.beta} * d)) / (1 - 2 * {e})"


@dataclass(frozen=True)
class OnlineIPO(Paired):
    """((Λ_w - Λ_l) - 1/(2β))² (IPO, arXiv:2310.12036, eq. 17).

    per_token: Λ/T in place of Λ, as TRL computes it for given pairs.
    """

    option: ClassVar[str] = "online_ipo"
    beta: float = param("beta", 0.1, "1/(2·beta) is the wanted margin", above=0)
    pairs: str = pairs_param("best_worst")
    labels: str = labels_param()
    per_token: bool = param("per_token", False, "the log-ratio is the mean over tokens")

    def score(self, at: Completions) -> Tensor:
        return at.log_ratio / at.lengths if self.per_token else at.log_ratio

    def score_slope(self, at: Completions) -> Tensor:
        return 1 / at.lengths if self.per_token else torch.ones_like(at.log_ratio)

    def score_text(self) -> str:
        return "Λ_i/T_i" if self.per_token else super().score_text()

    def score_code(self) -> str:
        return "Lam / T" if self.per_token else "Lam"

    def of_margin(self, margin: Tensor) -> Tensor:
        return (margin - 1 / (2 * self.beta)) ** 2

    def of_margin_slope(self, margin: Tensor) -> Tensor:
        return 2 * (margin - 1 / (2 * self.beta))

    def margin_text(self, margin: str) -> str:
        return f"({margin} − {number(1 / (2 * self.beta))})²"

    def margin_code(self) -> str:
        return f"(d - 1 / (2 * {self.beta})) ** 2"


@dataclass(frozen=True)
class Hinge(Paired):
    """max(0, 1 - β(Λ_w - Λ_l)) (the hinge of RSO, arXiv:2309.06657)."""

    option: ClassVar[str] = "hinge"
    beta: float = param("beta", 0.1, "1/beta is the margin beyond which nothing is learned", above=0)
    pairs: str = pairs_param()
    labels: str = labels_param()

    def of_margin(self, margin: Tensor) -> Tensor:
        return torch.relu(1 - self.beta * margin)

    def of_margin_slope(self, margin: Tensor) -> Tensor:
        return -self.beta * (1 - self.beta * margin > 0).to(margin.dtype)

    def margin_text(self, margin: str) -> str:
        return f"max(0, 1 − {number(self.beta)}·({margin}))"

    def margin_code(self) -> str:
        return f"(1 - {self.beta} * d).clamp(min=0)"


class _Imitating(Paired):
    """A paired loss without a reference that also imitates the winner: nll_coef·(-log π(y_w)), or its token mean."""

    anchor: ClassVar[str] = "none"
    per_token: ClassVar[bool] = False  # of the imitation
    nll_coef: float

    def imitation(self, at: Completions) -> tuple[Tensor, Tensor] | None:
        if not self.nll_coef:
            return None
        factor = -self.nll_coef / at.lengths if self.per_token else torch.full_like(at.lengths, -self.nll_coef)
        return factor * at.log_ratio, factor

    def imitation_text(self) -> str:
        if not self.nll_coef:
            return ""
        times = "" if self.nll_coef == 1 else f"{number(self.nll_coef)}·"
        return f" − {times}Λ_w{'/T_w' if self.per_token else ''}"

    def imitation_code(self) -> str:
        over = " / T[w]" if self.per_token else ""
        return f" - {self.nll_coef} * Lam[w]{over}" if self.nll_coef else ""


@dataclass(frozen=True)
class SLiC(_Imitating):
    """max(0, δ - (log π(y_w) - log π(y_l))) - λ·log π(y_w) (SLiC-HF, arXiv:2305.10425, eq. 1).

    The paper's target of imitation is a reference text or the best candidate; here it is the winner.
    """

    option: ClassVar[str] = "slic"
    delta: float = param("delta", 1.0, "margin of log-probabilities beyond which nothing is learned", above=0)
    nll_coef: float = param("nll_coef", 0.1, "weight of imitating the winner", low=0)
    pairs: str = pairs_param()
    labels: str = labels_param()

    def of_margin(self, margin: Tensor) -> Tensor:
        return torch.relu(self.delta - margin)

    def of_margin_slope(self, margin: Tensor) -> Tensor:
        return -(self.delta - margin > 0).to(margin.dtype)

    def margin_text(self, margin: str) -> str:
        return f"max(0, {number(self.delta)} − ({margin}))"

    def margin_code(self) -> str:
        return f"({self.delta} - d).clamp(min=0)"


@dataclass(frozen=True)
class CPO(_LogSigmoid, _Imitating):
    """-ln σ(β(log π(y_w) - log π(y_l))) - log π(y_w) (CPO, arXiv:2401.08417)."""

    option: ClassVar[str] = "cpo"
    beta: float = param("beta", 0.1, "factor of the margin", above=0)
    nll_coef: float = param("nll_coef", 1.0, "weight of imitating the winner", low=0)
    pairs: str = pairs_param()
    labels: str = labels_param()


@dataclass(frozen=True)
class SimPO(Paired):
    """-ln σ(β·log π(y_w)/T_w - β·log π(y_l)/T_l - γ) (SimPO, arXiv:2405.14734, eq. 6)."""

    option: ClassVar[str] = "simpo"
    anchor: ClassVar[str] = "none"
    beta: float = param("beta", 2.0, "factor of the mean log-probability of a token", above=0)
    target_margin: float = param("target_margin", 0.5, "γ, the margin to reach", low=0)
    pairs: str = pairs_param()
    labels: str = labels_param()

    def score(self, at: Completions) -> Tensor:
        return at.log_ratio / at.lengths

    def score_slope(self, at: Completions) -> Tensor:
        return 1 / at.lengths

    def score_text(self) -> str:
        return "Λ_i/T_i"

    def score_code(self) -> str:
        return "Lam / T"

    def of_margin(self, margin: Tensor) -> Tensor:
        return -logsigmoid(self.beta * margin - self.target_margin)

    def of_margin_slope(self, margin: Tensor) -> Tensor:
        return -self.beta * torch.sigmoid(self.target_margin - self.beta * margin)

    def margin_text(self, margin: str) -> str:
        return f"−ln σ({number(self.beta)}·({margin}) − {number(self.target_margin)})"

    def margin_code(self) -> str:
        return f"-torch.nn.functional.logsigmoid({self.beta} * d - {self.target_margin})"


@dataclass(frozen=True)
class ORPO(_Imitating):
    """-log π(y_w)/T_w - λ·ln σ(s_w - s_l), s the log-odds of p = π(y)^(1/T), ln(p/(1 - p)) (arXiv:2403.07691)."""

    option: ClassVar[str] = "orpo"
    per_token: ClassVar[bool] = True
    lam: float = param("odds_coef", 0.1, "weight of the odds ratio", above=0)
    nll_coef: float = param("nll_coef", 1.0, "weight of imitating the winner", low=0)
    pairs: str = pairs_param()
    labels: str = labels_param()

    def score(self, at: Completions) -> Tensor:
        mean = (at.log_ratio / at.lengths).clamp(max=_ODDS_LIMIT)
        return mean - torch.log(-torch.expm1(mean))

    def score_slope(self, at: Completions) -> Tensor:
        mean = at.log_ratio / at.lengths
        inside = -1 / torch.expm1(mean.clamp(max=_ODDS_LIMIT)) / at.lengths
        return torch.where(mean <= _ODDS_LIMIT, inside, torch.zeros_like(mean))

    def score_text(self) -> str:
        return "logit(e^(Λ_i/T_i))"

    def score_code(self) -> str:
        return f"(Lam / T).clamp(max={_ODDS_LIMIT}).exp().logit()"

    def of_margin(self, margin: Tensor) -> Tensor:
        return -self.lam * logsigmoid(margin)

    def of_margin_slope(self, margin: Tensor) -> Tensor:
        return -self.lam * torch.sigmoid(-margin)

    def margin_text(self, margin: str) -> str:
        return f"−{number(self.lam)}·ln σ({margin})"

    def margin_code(self) -> str:
        return f"-{self.lam} * torch.nn.functional.logsigmoid(d)"


class _Prospect(CompletionTerm):
    """Good completions (R > threshold): λ_d(1 - σ(β(Λ - z))); the others: λ_u(1 - σ(β(z - Λ))) (arXiv:2402.01306)."""

    coupling: ClassVar[str] = "batch"
    beta: float
    lam_d: float
    lam_u: float
    threshold: float

    def point(self, at: Completions, units: float) -> Tensor:
        """z, without gradient."""
        raise NotImplementedError

    def _parts(self, at: Completions, units: float) -> tuple[Tensor, Tensor, Tensor]:
        """(+1 for good and -1 for the others, the weight λ, z)."""
        good = at.reward > self.threshold
        one = torch.ones_like(at.reward)
        weight = torch.where(good, self.lam_d * one, self.lam_u * one)
        return torch.where(good, one, -one), weight, self.point(at, units)

    def value(self, at: Completions, units: float) -> Tensor:
        sign, weight, z = self._parts(at, units)
        return at.mean(weight * (1 - torch.sigmoid(self.beta * sign * (at.log_ratio - z))), units)

    def slope(self, at: Completions, units: float) -> Tensor:
        sign, weight, z = self._parts(at, units)
        gate = torch.sigmoid(self.beta * sign * (at.log_ratio - z))
        return -weight * self.beta * sign * gate * (1 - gate) / max(units, 1)

    def compute_metrics(self, at: Completions) -> dict[str, float]:
        good = self._parts(at, self.units(at))[0] > 0
        found = {"reference_point": float(self.point(at, self.units(at)))}
        for name, rows in (("chosen", at.live & good), ("rejected", at.live & ~good)):
            if bool(rows.any()):
                found[f"{name}_log_ratio"] = float(at.log_ratio[rows].mean())
        return found

    def _text(self, point: str) -> str:
        b, d, u, t = (number(x) for x in (self.beta, self.lam_d, self.lam_u, self.threshold))
        good, bad = f"{d}·(1 − σ({b}·(Λ_i − z)))", f"{u}·(1 − σ({b}·(z − Λ_i)))"
        return f"mean_i({good} if R_i > {t} else {bad}) where z = {point}"

    def _code(self, z: str) -> list[str]:
        return [
            f"z = {z}.mean().clamp(min=0)",
            f"good = {self.lam_d} * (1 - torch.sigmoid({self.beta} * (Lam - z)))",
            f"bad = {self.lam_u} * (1 - torch.sigmoid({self.beta} * (z - Lam)))",
            f"return torch.where(R > {self.threshold}, good, bad).mean()",
        ]


@dataclass(frozen=True)
class KTO(_Prospect):
    """KTO (arXiv:2402.01306, eq. 8): z = max(0, mean log-ratio of completions of other prompts), without gradient."""

    option: ClassVar[str] = "kto"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "mismatched_log_ratio"})
    beta: float = param("beta", 0.1, "strength of the pull to the reference", above=0)
    lam_d: float = param("lam_d", 1.0, "weight of good completions", low=0)
    lam_u: float = param("lam_u", 1.0, "weight of the others", low=0)
    threshold: float = param("threshold", 0.5, "reward above which a completion is good")

    def point(self, at: Completions, units: float) -> Tensor:
        theirs = at.batch.require("mismatched_log_ratio", "kto").to(at.log_ratio.dtype)
        return at.mean(theirs, units).clamp(min=0)

    def formula(self) -> str:
        return self._text("max(0, mean_i(Λ_mismatched))")

    def code(self) -> list[str]:
        return self._code("mismatched_log_ratio")


@dataclass(frozen=True)
class OnlineKTO(_Prospect):
    """KTO with z = max(0, mean of the batch's own Λ), without gradient.

    The paper takes z from mismatched pairs; on-policy, the mean of the batch's own Λ estimates the same KL.
    """

    option: ClassVar[str] = "online_kto"
    needs: ClassVar[frozenset[str]] = frozenset({"reward"})
    stops_gradient: ClassVar[bool] = True
    beta: float = param("beta", 0.1, "strength of the pull to the reference", above=0)
    lam_d: float = param("lam_d", 1.0, "weight of good completions", low=0)
    lam_u: float = param("lam_u", 1.0, "weight of the others", low=0)
    threshold: float = param("threshold", 0.0, "reward above which a completion is good")

    def point(self, at: Completions, units: float) -> Tensor:
        return at.mean(at.log_ratio.detach(), units).clamp(min=0)

    def formula(self) -> str:
        return self._text("sg(max(0, mean_i(Λ_i)))")

    def code(self) -> list[str]:
        return self._code("Lam.detach()")

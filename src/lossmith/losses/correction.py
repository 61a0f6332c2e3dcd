"""Sampler-trainer mismatch: a detached weight on the policy term where the sampler was not the old policy.

ρ = π_old / μ, with μ the distribution really sampled from. Dropped tokens stay in the normaliser, and KL and
entropy terms are not touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.batch import Batch
from lossmith.losses.piece import Piece, number, options, param
from lossmith.losses.ratio import bounded_exp

__all__ = ["MISMATCH", "Gate", "IcePop", "Mismatch", "NoMismatch", "TruncatedIS"]

_LEVELS = ("token", "sequence", "geometric")


class Mismatch(Piece):
    """Old and behaviour log-probabilities -> weight u [N, T], detached."""

    def __call__(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def formula(self) -> tuple[str, str]:
        """(text, LaTeX) of u."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoMismatch(Mismatch):
    """u = 1: the sampler is the old policy."""

    option: ClassVar[str] = "none"

    def __call__(self, batch: Batch) -> Tensor:
        return torch.ones_like(batch.require("logp", "every policy loss").detach())

    def formula(self) -> tuple[str, str]:
        return "1", "1"


def _log_rho(batch: Batch) -> Tensor:
    behavior = batch.require("behavior_logp", "a mismatch correction").detach()
    old = batch.old("a mismatch correction")
    return torch.where(batch.valid, old - behavior, torch.zeros_like(old))


def _at_level(x: Tensor, batch: Batch, level: str) -> Tensor:
    """Token values, or the completion's sum or mean broadcast to its tokens."""
    if level == "token":
        return x
    total = x.sum(1, keepdim=True)
    return (total if level == "sequence" else total / batch.lengths.clamp(min=1)[:, None]).expand_as(x)


def _level_name(level: str) -> tuple[str, str]:
    return {
        "token": ("ρ_t", r"\rho_t"),
        "sequence": ("Π_tρ_t", r"\textstyle\prod_t\rho_t"),
        "geometric": ("(Π_tρ_t)^(1/T)", r"(\textstyle\prod_t\rho_t)^{1/T}"),
    }[level]


@dataclass(frozen=True)
class TruncatedIS(Mismatch):
    """u = clip(ρ, low, high): truncated importance sampling."""

    option: ClassVar[str] = "tis"
    level: str = param("mismatch_level", "token", "unit over which ρ is taken", choices=_LEVELS)
    low: float = param("mismatch_low", 0.0, "smallest weight", low=0)
    high: float = param("mismatch_high", 2.0, "largest weight", above=0)

    def __call__(self, batch: Batch) -> Tensor:
        return bounded_exp(_at_level(_log_rho(batch), batch, self.level)).clamp(self.low, self.high)

    def formula(self) -> tuple[str, str]:
        (text, tex), lo, hi = _level_name(self.level), number(self.low), number(self.high)
        return f"clip({text}, {lo}, {hi})", rf"\operatorname{{clip}}({tex}, {lo}, {hi})"


@dataclass(frozen=True)
class IcePop(Mismatch):
    """u = ρ inside [low, high], 0 outside (arXiv:2510.18855)."""

    option: ClassVar[str] = "icepop"
    level: str = param("mismatch_level", "token", "unit over which ρ is taken", choices=_LEVELS)
    low: float = param("mismatch_low", 0.5, "smallest ρ that is kept", low=0)
    high: float = param("mismatch_high", 5.0, "largest ρ that is kept", above=0)

    def __call__(self, batch: Batch) -> Tensor:
        rho = bounded_exp(_at_level(_log_rho(batch), batch, self.level))
        return torch.where((rho >= self.low) & (rho <= self.high), rho, torch.zeros_like(rho))

    def formula(self) -> tuple[str, str]:
        (text, tex), lo, hi = _level_name(self.level), number(self.low), number(self.high)
        return f"{text}·[{lo} ≤ {text} ≤ {hi}]", rf"{tex}\,\mathbb 1[{lo}\le {tex}\le {hi}]"


@dataclass(frozen=True)
class Gate(Mismatch):
    """u = x·1[low <= stat <= high], with x = ρ_t if weighted, else 1."""

    option: ClassVar[str] = "gate"
    level: str = param("mismatch_level", "sequence", "unit over which the statistic is taken", choices=_LEVELS)
    stat: str = param(
        "mismatch_stat", "ratio", "statistic that must lie in the band", choices=("ratio", "tv", "binary_kl")
    )
    low: float = param("mismatch_low", 0.0, "smallest statistic that is kept", low=0)
    high: float = param("mismatch_high", math.inf, "largest statistic that is kept", above=0)
    weighted: bool = param("mismatch_weighted", True, "kept tokens are weighted by ρ_t")

    def __call__(self, batch: Batch) -> Tensor:
        log_rho = _log_rho(batch)
        stat = self._statistic(batch, log_rho)
        weight = bounded_exp(log_rho) if self.weighted else torch.ones_like(log_rho)
        return torch.where((stat >= self.low) & (stat <= self.high), weight, torch.zeros_like(weight))

    def _statistic(self, batch: Batch, log_rho: Tensor) -> Tensor:
        if self.stat == "ratio":
            return bounded_exp(_at_level(log_rho, batch, self.level))
        mu = batch.require("behavior_logp", "a mismatch gate").detach().exp()
        old = batch.old("a mismatch gate").exp()
        if self.stat == "tv":
            per_token = (mu - old).abs()
        else:
            mu, old = mu.clamp(1e-6, 1 - 1e-6), old.clamp(1e-6, 1 - 1e-6)
            per_token = mu * (mu / old).log() + (1 - mu) * ((1 - mu) / (1 - old)).log()
        return _at_level(torch.where(batch.valid, per_token, torch.zeros_like(per_token)), batch, self.level)

    def formula(self) -> tuple[str, str]:
        lo, hi = number(self.low), number(self.high)
        names = {"ratio": _level_name(self.level), "tv": ("|μ−π_old|", r"|\mu-\pi_{\mathrm{old}}|")}
        text, tex = names.get(self.stat, ("KL(μ‖π_old)", r"\mathrm{KL}(\mu\|\pi_{\mathrm{old}})"))
        if self.stat != "ratio" and self.level != "token":
            over = {"sequence": ("Σ_t", r"\textstyle\sum_t"), "geometric": ("mean_t", r"\operatorname{mean}_t")}[
                self.level
            ]
            text, tex = f"{over[0]} {text}", rf"{over[1]} {tex}"
        x = ("ρ_t·", r"\rho_t\,") if self.weighted else ("", "")
        return f"{x[0]}[{lo} ≤ {text} ≤ {hi}]", rf"{x[1]}\mathbb 1[{lo}\le {tex}\le {hi}]"


MISMATCH = options(NoMismatch, TruncatedIS, IcePop, Gate)

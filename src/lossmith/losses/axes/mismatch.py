"""Sampler-trainer mismatch: a detached weight on the policy term where the sampler was not the old policy.

ρ = π_old / μ, with μ the distribution really sampled from. Dropped tokens stay in the normalizer, and KL and
entropy terms are not touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.kl import kl_estimate
from lossmith.losses.axes.ratio import bounded_exp
from lossmith.losses.batch import Batch
from lossmith.losses.piece import Piece, in_code, number, options, param, pieces_in

__all__ = ["MISMATCH", "TIS", "Gate", "IcePop", "Mismatch", "NoMismatch"]

_LEVELS = ("token", "sequence", "geometric")


class Mismatch(Piece):
    """Old and behavior log-probabilities -> weight u [N, T], detached."""

    needs: ClassVar[frozenset[str]] = frozenset({"behavior_logp"})
    reads_old: ClassVar[bool] = True
    normalize: bool

    @property
    def coupling(self) -> str:  # type: ignore[override]
        return "batch" if self.normalize else "token"

    def __call__(self, batch: Batch) -> Tensor:
        u = self.raw(batch)
        if not self.normalize:
            return u
        mean = torch.where(batch.valid, u, torch.zeros_like(u)).sum() / batch.valid.sum().clamp(min=1)
        return u / torch.where(mean > 0, mean, torch.ones_like(mean))

    def raw(self, batch: Batch) -> Tensor:
        """u before it is divided by its mean."""
        raise NotImplementedError

    def formula(self) -> str:
        """u."""
        return f"w / mean_{{i,t}}(w) where w = {self.raw_formula()}" if self.normalize else self.raw_formula()

    def raw_formula(self) -> str:
        """u before it is divided by its mean, from ρ = π_old/μ."""
        raise NotImplementedError

    def code(self) -> list[str]:
        """Lines of plain torch that compute `u` [N, T]."""
        if not self.normalize:
            return self.raw_code()
        return [*self.raw_code(), "u = u.expand(mask.shape)", "u = u / u[mask].mean()"]

    def raw_code(self) -> list[str]:
        """The lines before u is divided by its mean."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoMismatch(Mismatch):
    """u = 1: the sampler is the old policy."""

    option: ClassVar[str] = "none"
    acts: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    reads_old: ClassVar[bool] = False
    normalize: ClassVar[bool] = False  # type: ignore[misc]

    def raw(self, batch: Batch) -> Tensor:
        return torch.ones((), dtype=batch.dtype, device=batch.valid.device).expand(batch.valid.shape)

    def raw_code(self) -> list[str]:
        return []

    def raw_formula(self) -> str:
        return "1"


def _log_rho(batch: Batch) -> Tensor:
    behavior = batch.require("behavior_logp", "a mismatch correction").detach()
    return batch.old("a mismatch correction") - behavior  # a batch holds 0 at masked positions of both


def _at_level(x: Tensor, batch: Batch, level: str) -> Tensor:
    """Token values, or the completion's sum or mean broadcast to its tokens."""
    if level == "token":
        return x
    total = x.sum(1, keepdim=True)
    return (total if level == "sequence" else total / batch.lengths.clamp(min=1)[:, None]).expand_as(x)


def _rho_code(level: str) -> list[str]:
    log_rho = "log_rho = torch.where(mask, old_logp - behavior_logp, 0.0)"
    over = {"token": "log_rho", "sequence": "log_rho.sum(1, keepdim=True)"}
    return [log_rho, f"rho = ({over.get(level, 'log_rho.sum(1, keepdim=True) / T[:, None]')}).exp()"]


def _level_name(level: str) -> str:
    return {"token": "ρ", "sequence": "(Π_t ρ)", "geometric": "(Π_t ρ)^(1/T)"}[level]


@dataclass(frozen=True)
class TIS(Mismatch):
    """u = clip(ρ, low, high): truncated importance sampling."""

    option: ClassVar[str] = "tis"
    ordered: ClassVar[tuple[tuple[str, str], ...]] = (("low", "high"),)
    level: str = param("mismatch_level", "token", "unit over which ρ is taken", choices=_LEVELS)
    low: float = param("mismatch_low", 0.0, "smallest weight", low=0)
    high: float = param("mismatch_high", 2.0, "largest weight", above=0, bound=True)
    normalize: bool = param("mismatch_batch_normalize", False, "divide the weights by their mean over the tokens")

    def raw(self, batch: Batch) -> Tensor:
        return bounded_exp(_at_level(_log_rho(batch), batch, self.level)).clamp(self.low, self.high)

    def raw_formula(self) -> str:
        return f"clip({_level_name(self.level)}, {number(self.low)}, {number(self.high)})"

    def raw_code(self) -> list[str]:
        return [*_rho_code(self.level), f"u = rho.clamp({self.low}, {in_code(self.high)})"]


@dataclass(frozen=True)
class IcePop(Mismatch):
    """u = ρ inside [low, high], 0 outside (arXiv:2510.18855)."""

    option: ClassVar[str] = "icepop"
    ordered: ClassVar[tuple[tuple[str, str], ...]] = (("low", "high"),)
    level: str = param("mismatch_level", "token", "unit over which ρ is taken", choices=_LEVELS)
    low: float = param("mismatch_low", 0.5, "smallest ρ that is kept", low=0)
    high: float = param("mismatch_high", 5.0, "largest ρ that is kept", above=0, bound=True)
    normalize: bool = param("mismatch_batch_normalize", False, "divide the weights by their mean over the tokens")

    def raw(self, batch: Batch) -> Tensor:
        rho = bounded_exp(_at_level(_log_rho(batch), batch, self.level))
        return torch.where((rho >= self.low) & (rho <= self.high), rho, torch.zeros_like(rho))

    def raw_formula(self) -> str:
        rho = _level_name(self.level)
        return f"{rho}·[{number(self.low)} ≤ {rho} ≤ {number(self.high)}]"

    def raw_code(self) -> list[str]:
        band = f"(rho >= {self.low}) & (rho <= {in_code(self.high)})"
        return [*_rho_code(self.level), f"u = torch.where({band}, rho, 0.0)"]


@dataclass(frozen=True)
class Gate(Mismatch):
    """u = x·1[low <= stat <= high], with x = ρ_t if weighted, else 1."""

    option: ClassVar[str] = "gate"
    ordered: ClassVar[tuple[tuple[str, str], ...]] = (("low", "high"),)
    level: str = param("mismatch_level", "sequence", "unit over which the statistic is taken", choices=_LEVELS)
    stat: str = param(
        "mismatch_stat",
        "ratio",
        "statistic that must lie in the band",
        choices=("ratio", "tv", "binary_kl", "k1", "k2", "k3"),
    )
    low: float = param("mismatch_low", 0.0, "smallest statistic that is kept", low=0)
    high: float = param("mismatch_high", math.inf, "largest statistic that is kept", above=0, bound=True)
    weighted: bool = param("mismatch_weighted", True, "kept tokens are weighted by ρ_t")
    normalize: bool = param("mismatch_batch_normalize", False, "divide the weights by their mean over the tokens")

    def raw(self, batch: Batch) -> Tensor:
        log_rho = _log_rho(batch)
        stat = self._statistic(batch, log_rho)
        weight = bounded_exp(log_rho) if self.weighted else torch.ones_like(log_rho)
        return torch.where((stat >= self.low) & (stat <= self.high), weight, torch.zeros_like(weight))

    def _statistic(self, batch: Batch, log_rho: Tensor) -> Tensor:
        if self.stat == "ratio":
            return bounded_exp(_at_level(log_rho, batch, self.level))
        if self.stat in ("k1", "k2", "k3"):  # KL(μ‖π_old) from tokens that μ sampled
            return _at_level(kl_estimate(-log_rho, self.stat), batch, self.level)
        mu = batch.require("behavior_logp", "a mismatch gate").detach().exp()
        old = batch.old("a mismatch gate").exp()
        if self.stat == "tv":
            per_token = (mu - old).abs()
        else:
            mu, old = mu.clamp(1e-6, 1 - 1e-6), old.clamp(1e-6, 1 - 1e-6)
            per_token = mu * (mu / old).log() + (1 - mu) * ((1 - mu) / (1 - old)).log()
        return _at_level(torch.where(batch.valid, per_token, torch.zeros_like(per_token)), batch, self.level)

    def raw_formula(self) -> str:
        stat = {
            "tv": "|μ(y_t) − π_old(y_t)|",
            "binary_kl": "KL₂(μ(y_t)‖π_old(y_t))",
            "k1": "(−log ρ)",
            "k2": "(log ρ)²/2",
            "k3": "(ρ − 1 − log ρ)",
        }.get(self.stat, _level_name(self.level))
        if self.stat != "ratio" and self.level != "token":
            stat = f"Σ_t {stat}" if self.level == "sequence" else f"mean_t({stat})"
        return f"{'ρ·' * self.weighted}[{number(self.low)} ≤ {stat} ≤ {number(self.high)}]"

    def raw_code(self) -> list[str]:
        log_rho = "log_rho = torch.where(mask, old_logp - behavior_logp, 0.0)"
        per_token = {
            "tv": "(behavior_logp.exp() - old_logp.exp()).abs()",
            "binary_kl": "a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()",
            "k1": "-log_rho",
            "k2": "log_rho**2 / 2",
            "k3": "log_rho.exp() - 1 - log_rho",
            "ratio": "log_rho",
        }[self.stat]
        over = {"token": "stat", "sequence": "stat.sum(1, keepdim=True)"}
        level = over.get(self.level, "stat.sum(1, keepdim=True) / T[:, None]")
        clamped = "a, b = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (behavior_logp, old_logp))"
        return [
            log_rho,
            *([clamped] if self.stat == "binary_kl" else []),
            f"stat = torch.where(mask, {per_token}, 0.0)",
            f"stat = {f'({level}).exp()' if self.stat == 'ratio' else level}",
            f"inside = (stat >= {self.low}) & (stat <= {in_code(self.high)})",
            f"u = torch.where(inside, {'log_rho.exp()' if self.weighted else '1.0'}, 0.0)",
        ]


MISMATCH: dict[str, type[Mismatch]] = options(*pieces_in(Mismatch, globals()))

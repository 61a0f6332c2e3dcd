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

    def formula(self) -> tuple[str, str]:
        """(text, LaTeX) of u."""
        text, tex = self.raw_formula()
        return (f"{text} / mean", rf"{tex} / \operatorname{{mean}}") if self.normalize else (text, tex)

    def raw_formula(self) -> tuple[str, str]:
        """(text, LaTeX) of u before it is divided by its mean."""
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

    def raw_formula(self) -> tuple[str, str]:
        return "1", "1"


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


def _level_name(level: str) -> tuple[str, str]:
    return {
        "token": ("ρ_t", r"\rho_t"),
        "sequence": ("Π_tρ_t", r"\textstyle\prod_t\rho_t"),
        "geometric": ("(Π_tρ_t)^(1/T)", r"(\textstyle\prod_t\rho_t)^{1/T}"),
    }[level]


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

    def raw_formula(self) -> tuple[str, str]:
        (text, tex), lo, hi = _level_name(self.level), number(self.low), number(self.high)
        return f"clip({text}, {lo}, {hi})", rf"\operatorname{{clip}}({tex}, {lo}, {hi})"

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

    def raw_formula(self) -> tuple[str, str]:
        (text, tex), lo, hi = _level_name(self.level), number(self.low), number(self.high)
        return f"{text}·[{lo} ≤ {text} ≤ {hi}]", rf"{tex}\,\mathbb 1[{lo}\le {tex}\le {hi}]"

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

    def raw_formula(self) -> tuple[str, str]:
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

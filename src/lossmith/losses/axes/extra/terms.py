"""Extra terms of the sampled token's log-probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.extra.base import Extra
from lossmith.losses.batch import Batch
from lossmith.losses.piece import number, param

__all__ = ["SFT", "NLLPositive", "NoExtra", "SquareLogRatio"]


@dataclass(frozen=True)
class NoExtra(Extra):
    """No extra term."""

    option: ClassVar[str] = "none"
    acts: ClassVar[bool] = False


@dataclass(frozen=True)
class SquareLogRatio(Extra):
    """coef·(logp - log μ)² on every valid token: a pull towards the sampler (arXiv:2602.02276; PRIME-RL)."""

    option: ClassVar[str] = "square_log_ratio"
    needs: ClassVar[frozenset[str]] = frozenset({"behavior_logp"})
    coef: float = param("coef", 1e-3, "coefficient of the squared log-ratio to the sampler", low=0)

    def _gap(self, batch: Batch) -> Tensor:
        mu = batch.require("behavior_logp", "extra='square_log_ratio'").detach()
        return batch.require("logp", "every policy loss") - mu

    def value(self, batch: Batch, advantage: Tensor) -> Tensor:
        return self.coef * self._gap(batch) ** 2

    def slope(self, batch: Batch, advantage: Tensor) -> Tensor:
        return 2 * self.coef * self._gap(batch).detach()

    def formula(self) -> str | None:
        return f"{number(self.coef)}·(log π_θ(y_t) − log μ(y_t))²"

    def code(self) -> list[str]:
        return [f"loss = loss + {self.coef} * (logp - behavior_logp) ** 2"]


@dataclass(frozen=True)
class NLLPositive(Extra):
    """-nll_coef·logp where A > 0: imitation of what went well (VAPO, arXiv:2504.05118)."""

    option: ClassVar[str] = "nll_positive"
    coef: float = param("nll_coef", 0.1, "coefficient of the log-likelihood of tokens with A > 0", low=0)

    def value(self, batch: Batch, advantage: Tensor) -> Tensor:
        logp = batch.require("logp", "every policy loss")
        return -self.coef * (advantage > 0).to(logp.dtype) * logp

    def slope(self, batch: Batch, advantage: Tensor) -> Tensor:
        return -self.coef * (advantage > 0).to(advantage.dtype)

    def formula(self) -> str | None:
        return f"−{number(self.coef)}·[A > 0]·log π_θ(y_t)"

    def code(self) -> list[str]:
        return [f"loss = loss - torch.where(A > 0, {self.coef} * logp, 0.0)"]


@dataclass(frozen=True)
class SFT(Extra):
    """-sft_coef·logp on every valid token: imitation of all completions."""

    option: ClassVar[str] = "sft"
    coef: float = param("sft_coef", 0.1, "coefficient of the log-likelihood", low=0)

    def value(self, batch: Batch, advantage: Tensor) -> Tensor:
        return -self.coef * batch.require("logp", "every policy loss")

    def slope(self, batch: Batch, advantage: Tensor) -> Tensor:
        return torch.full_like(advantage, -self.coef)

    def formula(self) -> str | None:
        return f"−{number(self.coef)}·log π_θ(y_t)"

    def code(self) -> list[str]:
        return [f"loss = loss - {self.coef} * logp"]

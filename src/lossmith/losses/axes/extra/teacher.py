"""Extra terms that read a teacher at the sampled token only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.extra.base import Extra
from lossmith.losses.batch import Batch
from lossmith.losses.piece import number, param

__all__ = ["GatedTeacher"]


@dataclass(frozen=True)
class GatedTeacher(Extra):
    """coef·sg(σ(gate·d))·d, d = log π_T - log π_θ: imitation of tokens that the teacher holds likelier than the policy
    (SDAR, arXiv:2605.15155, as ms-swift 4.6.0 computes it).
    """

    option: ClassVar[str] = "gated_teacher"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logp"})
    stops_gradient: ClassVar[bool] = True
    coef: float = param("distil_coef", 0.1, "coefficient of the gated log-ratio of teacher and policy", low=0)
    gate: float = param("gate", 5.0, "steepness of the gate", above=0)

    def _gap(self, batch: Batch) -> Tensor:
        teacher = batch.require("teacher_logp", "extra='gated_teacher'").detach()
        return teacher - batch.require("logp", "every policy loss")

    def value(self, batch: Batch, advantage: Tensor) -> Tensor:
        gap = self._gap(batch)
        return self.coef * torch.sigmoid(self.gate * gap.detach()) * gap

    def slope(self, batch: Batch, advantage: Tensor) -> Tensor:
        return -self.coef / (1 + torch.exp(-self.gate * self._gap(batch).detach()))

    def formula(self) -> str:
        gap = "(log π_T(y_t) − log π_θ(y_t))"
        return f"{number(self.coef)}·sg(σ({number(self.gate)}·{gap}))·{gap}"

    def code(self) -> list[str]:
        return [
            "gap = teacher_logp - logp",
            f"loss = loss + {self.coef} * torch.sigmoid({self.gate} * gap.detach()) * gap",
        ]

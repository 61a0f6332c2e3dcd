"""The critic's loss: V fitted to returns, with gradient into the value head only through `Batch.value`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lossmith.losses.batch import Batch
from lossmith.losses.piece import Piece, number, param

__all__ = ["ValueLoss"]


@dataclass(frozen=True)
class ValueLoss(Piece):
    """coef · ½ max((V - G)², (clip(V, V_old ± c) - G)²), aggregated like the policy term (book eq. 4.32).

    G is detached (a semi-gradient); without `clip` it is the plain squared error over two.
    """

    coef: float = param("value_coef", 0.0, "coefficient of the critic's loss; 0 means no critic is trained", low=0)
    clip: float | None = param("value_clip", None, "bound on the critic's move in one update", above=0, bound=True)

    @property
    def active(self) -> bool:
        return self.coef > 0

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"value"} if self.active else ())

    @property
    def looks_at(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"old_value"} if self.active and self.clip is not None else ())

    def term(self, batch: Batch, returns: Tensor) -> Tensor:
        """[N, T] before the coefficient, with gradient into batch.value."""
        value = batch.require("value", "a value loss")
        error = (value - returns) ** 2  # finite at masked positions, where its weight is 0
        if self.clip is None:
            return 0.5 * error
        old = batch.old_value.detach() if batch.old_value is not None else value.detach()
        near = old + (value - old).clamp(-self.clip, self.clip)
        clipped = (near - returns) ** 2
        return 0.5 * torch.maximum(error, clipped)

    def formula(self) -> str:
        """The term with its coefficient."""
        c = number(self.coef)
        if self.clip is None:
            return f"{c}·½(V_θ − G)²"
        return f"{c}·½max((V_θ − G)², (clip(V_θ, V ± {number(self.clip)}) − G)²)"

    def code(self) -> list[str]:
        """Lines of plain torch that compute the term `critic` [N, T] with its coefficient, towards G."""
        if self.clip is None:
            return [f"critic = {self.coef} * 0.5 * (value - G) ** 2"]
        return [
            f"near = old_value + (value - old_value).clamp(-{self.clip}, {self.clip})",
            f"critic = {self.coef} * 0.5 * torch.maximum((value - G) ** 2, (near - G) ** 2)",
        ]

"""A loss of a whole batch through its micro-batches: what each is given of dL/d(outputs), and metrics that add up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lossmith.losses import LossOutput

__all__ = ["OutputGradients", "added", "metrics_of"]


@dataclass(frozen=True, eq=False)
class OutputGradients:
    """dL/d(outputs) of a whole batch, and what was measured with it."""

    gradient: dict[str, Tensor]  # {logp, entropy, ...: [N, T]}
    metrics: dict[str, float]

    def surrogate_loss(self, graded: dict[str, Tensor], rows: Tensor) -> Tensor:
        """A scalar whose gradient in the parameters is that of the loss through these rows."""
        terms = [(self.gradient[k][rows].to(v.dtype) * v).sum() for k, v in graded.items() if k in self.gradient]
        return torch.stack(terms).sum() if terms else torch.zeros(())


def metrics_of(result: LossOutput) -> dict[str, float]:
    """The loss, its terms, and what it measures, as numbers."""
    terms = {f"loss_{name}": float(term.detach()) for name, term in result.terms.items()}
    return {"loss": float(result.loss.detach())} | terms | result.metrics


def added(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Metrics that are shares of a whole."""
    return {k: a.get(k, 0.0) + b.get(k, 0.0) for k in {**a, **b}}

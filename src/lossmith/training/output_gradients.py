"""What goes between a loss and the passes it is computed in: dL/d(outputs) of a whole batch, metrics that add up."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.losses import Credit, LossOutput
from lossmith.policy import TokenOutputs

__all__ = ["OutputGradients", "added", "credit_to", "metrics_of", "on_cpu"]


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


def on_cpu(out: TokenOutputs) -> TokenOutputs:
    return dataclasses.replace(
        out, logp=out.logp.cpu(), mask=out.mask.cpu(), value=None if out.value is None else out.value.cpu()
    )


def credit_to(credit: Credit, device: torch.device | str) -> Credit:
    """The credit there."""
    parts: dict[str, Any] = {name: x.to(device) for name, x in credit.parts.items()}
    return dataclasses.replace(credit, **parts, given={name: x.to(device) for name, x in credit.given.items()})

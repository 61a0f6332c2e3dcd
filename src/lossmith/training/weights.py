"""What an update did to the weights, looked at in a few thousand places of each tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["WeightWatch"]

PLACES = 4096  # of a tensor, evenly spread: a share of a thousandth of all is then seen to a tenth of itself


class WeightWatch:
    """Of the policy and, where there is one, of the reference. Begins with the weights as they are when it is made."""

    def __init__(self, parameters: Sequence[nn.Parameter], reference: Sequence[nn.Parameter]) -> None:
        self.parameters, self.reference = list(parameters), list(reference)
        self.start, self.anchor = _look(self.parameters), _look(self.reference)
        self.before = self.start

    def begin(self) -> None:
        """An update begins."""
        self.before = _look(self.parameters)

    def measured(self) -> dict[str, float]:
        """What has changed since it began, and since the very beginning."""
        now = _look(self.parameters)
        size = float(self.before.double().square().mean().sqrt())
        change = float((now.double() - self.before.double()).square().mean().sqrt())
        found = {
            "weight_step": change / size if size else float(change > 0),
            "weights_moved": _share(now.bfloat16() != self.start.bfloat16()),
        }
        if self.reference:
            found["reference_moved"] = _share(_look(self.reference) != self.anchor)
        return found


def _look(parameters: Sequence[nn.Parameter]) -> Tensor:
    """[places] the weights looked at, float32 on their device."""
    seen = []
    for p in parameters:
        flat = p.detach().reshape(-1)
        seen.append(flat[:: max(1, len(flat) // PLACES)][:PLACES].float())
    return torch.cat(seen) if seen else torch.zeros(0)


def _share(where: Tensor) -> float:
    return float(where.double().mean()) if len(where) else 0.0

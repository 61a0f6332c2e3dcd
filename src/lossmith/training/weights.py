"""What an update did to the weights, looked at in a few thousand places of each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lossmith.policy.sharded import first_row

__all__ = ["WeightWatch"]

PLACES = 4096  # of a tensor, evenly spread: a share of a thousandth of all is then seen to a tenth of itself


class WeightWatch:
    """Of the policy and, where there is one, of the reference. Begins with the weights as they are when it is made.

    Of weights that ranks hold in parts, every rank has one and asks it at the same time; all are told the same.
    """

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
    if not parameters:
        return torch.zeros(0)
    seen = torch.cat([_places(p.detach()) for p in parameters])
    in_parts: Any = parameters[0]
    if hasattr(in_parts, "device_mesh"):
        dist.all_reduce(seen, group=in_parts.device_mesh.get_group())
    return seen


def _places(p: Any) -> Tensor:
    """The places of one tensor; of one in parts, 0 where a place is another rank's."""
    step = max(1, p.numel() // PLACES)
    if not hasattr(p, "device_mesh"):
        return cast(Tensor, p.reshape(-1)[::step][:PLACES].float())
    mine, row = p.to_local().reshape(-1), p.shape[1:].numel()
    start = first_row(p) * row
    first, last = -(-start // step), -(-(start + len(mine)) // step)
    seen = torch.zeros(-(-p.numel() // step), device=mine.device)
    seen[first:last] = mine[first * step - start :: step].float()
    return seen[:PLACES]


def _share(where: Tensor) -> float:
    return float(where.double().mean()) if len(where) else 0.0

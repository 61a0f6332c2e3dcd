"""The second screen: w(r, A) over the ratio, for good and bad actions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from lossmith.errors import LossError
from lossmith.explorer.chosen import build
from lossmith.explorer.numbers import printed
from lossmith.losses import Loss
from lossmith.report.loss import RATIOS, ratio_grid, stopped_regions

__all__ = ["SIGNS", "weights"]

SIGNS = (("A > 0", 1.0), ("A < 0", -1.0))


def weights(calls: list[str], old_prob: float) -> dict[str, Any]:
    """The curves of losses that can be built; in words, why one has none."""
    curves = [_curves(call, old_prob) for call in calls]
    drawn = [min(w, 3.0) for one in curves for side in one["sides"] for w in side["y"]]
    return {
        "ratios": ratio_grid(),
        "ratio_texts": [printed(r) for r in ratio_grid()],
        "columns": [f"{r:g}" for r in RATIOS],
        "top": max([1.0, *drawn]) * 1.08,
        "bottom": min([0.0, *(max(w, -1.0) for one in curves for side in one["sides"] for w in side["y"])]),
        "curves": curves,
    }


@lru_cache(maxsize=64)
def _curves(call: str, old_prob: float) -> dict[str, Any]:
    loss = build(call)
    try:
        return {"error": "", "sides": [_side(loss, label, sign, old_prob) for label, sign in SIGNS]}
    except (NotImplementedError, LossError) as error:
        return {"error": str(error), "sides": []}


def _side(loss: Loss, label: str, sign: float, old_prob: float) -> dict[str, Any]:
    def alone(r: float) -> float:
        return float(loss.weight(torch.tensor(r, dtype=torch.float64), sign, old_prob))

    grid = ratio_grid()
    if loss.separable:  # at once, where a token's weight does not look at the others
        y = loss.weight(torch.tensor(grid, dtype=torch.float64), sign, old_prob).tolist()
    else:
        y = [alone(r) for r in grid]
    known = dict(zip(grid, y, strict=True))
    regions = stopped_regions(lambda r: known[r] if r in known else alone(r))
    return {
        "label": label,
        "y": y,
        "texts": [printed(w) for w in y],
        "stopped": [{"from": a, "to": b, "text": f"{printed(a)} to {printed(b)}"} for a, b in regions],
        "row": [printed(alone(r)) for r in RATIOS],
    }

"""The weight: w(r, A) over the ratio, for advantages above and below 0, overlaid; where it is 0, nothing is learned."""

from __future__ import annotations

from typing import Any

import torch

from lossmith.errors import LossError
from lossmith.explorer.address import State
from lossmith.explorer.chosen import Chosen
from lossmith.explorer.drawing import Line, chart, figure
from lossmith.losses import Loss, PolicyLoss

__all__ = ["SHOWN", "stops", "view", "weights_at"]

SHOWN = ("advantage", "old_prob", "ratio")
LOW, HIGH, POINTS, FEW = 0.1, 10.0, 361, 61


def view(state: State, losses: list[Chosen]) -> dict[str, Any]:
    """charts: one for each sign of A. readings: w and the push w·A at the ratio that is asked for, a loss a row."""
    size, old, ratio = state["advantage"], state["old_prob"], state["ratio"]
    charts: list[dict[str, Any]] = []
    without: list[tuple[Chosen, str]] = []
    rows: list[dict[str, Any]] = []
    drawn: dict[float, list[Line]] = {size: [], -size: []}
    for one in losses:
        if one.loss is None:
            continue
        try:
            row = [weights_at(one.loss, [ratio], a, old)[0] for a in (size, -size)]
            for a in drawn:
                drawn[a].append(_line(one, a, old))
        except (NotImplementedError, LossError) as error:
            without.append((one, str(error)))
            continue
        rows.append({"one": one, "above": row[0], "below": row[1], "push": (row[0] * size, -row[1] * size)})
    for a, lines in drawn.items() if rows else ():
        sign, what = ("A > 0", "a good token") if a > 0 else ("A < 0", "a bad token")
        top = max(1.0, *(min(b, 3.0) for line in lines for _, b in line.points)) * 1.08
        said = f"weight over the ratio for {sign}: " + "; ".join(_said(line) for line in lines)
        drawing = chart(
            f"weight{sign[2]}", lines, "ratio r = π_θ/π_old, log scale", "w", log=True,
            ticks=(0.1, 0.2, 0.5, 1, 2, 5, 10), top=top, at=ratio, said=said,
        )  # fmt: skip
        charts.append({"title": f"{sign}: {what}", "svg": drawing})
    own = [row["one"].letter for row in rows if not isinstance(row["one"].loss, PolicyLoss)]
    return {"charts": charts, "rows": rows, "without": without, "own": own, "ratio": figure(ratio)}


def weights_at(loss: Loss, ratios: list[float], advantage: float, old_prob: float) -> list[float]:
    """w at these ratios. LossError, NotImplementedError: there is none, and why."""
    r = torch.tensor(ratios, dtype=torch.float64)
    found: list[float] = loss.weight(r, advantage, old_prob).tolist()
    return found


def _line(one: Chosen, advantage: float, old: float) -> Line:
    loss = one.loss
    assert loss is not None
    points = POINTS if isinstance(loss, PolicyLoss) else FEW  # a function's weight is measured, point by point
    grid = [LOW * (HIGH / LOW) ** (i / (points - 1)) for i in range(points)]
    w = weights_at(loss, grid, advantage, old)
    return Line(one.place, one.letter, list(zip(grid, w, strict=True)), stops(loss, advantage, old, grid, w))


def stops(loss: Loss, advantage: float, old: float, grid: list[float], w: list[float]) -> list[tuple[float, float]]:
    """Stretches of the ratio at which the weight is 0; their ends by bisection, all at once."""
    edges = [i for i in range(1, len(grid)) if (w[i] == 0) != (w[i - 1] == 0)]
    a, b = [grid[i - 1] for i in edges], [grid[i] for i in edges]
    for _ in range(40 if edges and isinstance(loss, PolicyLoss) else 0):
        middle = [(x * y) ** 0.5 for x, y in zip(a, b, strict=True)]
        at = weights_at(loss, middle, advantage, old)
        same = [(x == 0) == (w[i - 1] == 0) for i, x in zip(edges, at, strict=True)]
        a = [m if s else x for m, x, s in zip(middle, a, same, strict=True)]
        b = [y if s else m for m, y, s in zip(middle, b, same, strict=True)]
    ends = [grid[0], *b, grid[-1]] if w[0] == 0 else [*b, grid[-1]]
    return [(x, y) for x, y in zip(ends[::2], ends[1::2], strict=False)]


def _said(line: Line) -> str:
    cut = ", ".join(f"{figure(a, 3)} to {figure(b, 3)}" for a, b in line.bars)
    return f"{line.name} {'is 0 from ' + cut if cut else 'is nowhere 0'}"

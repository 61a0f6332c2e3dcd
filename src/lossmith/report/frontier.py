"""Reward against distance: how the trained score and the watched one move as the policy leaves the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lossmith.errors import RunError
from lossmith.training.guards import kl_of_completion
from lossmith.training.run import read_metrics

__all__ = ["plot_frontier"]

_COLOURS = ("#0b6e99", "#c4552d", "#3d7a3a", "#7b4fa3", "#8a6d00", "#555555")


def plot_frontier(runs: Sequence[Path], target: Path, smooth: int = 3) -> None:
    """Write an image (by its suffix: svg, png, pdf) of reward and watched score against sqrt(KL), a colour a run.

    KL is that of a completion, nats, against the reference (the axis of arXiv:2210.10760). Each point is the mean of
    `smooth` steps, as every step has other prompts. RunError: a run without steps, or without a measured KL.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 3.8), sharex=True, layout="constrained")
    try:
        for run, colour in zip(runs, _COLOURS * len(runs), strict=False):
            records = _records(run)
            distance = _smooth([math.sqrt(max(0.0, kl_of_completion(r) or 0.0)) for r in records], smooth)
            for axis, key in zip(axes, ("reward", "watch"), strict=True):
                values = _smooth([r[key] for r in records if key in r], smooth)
                if values:
                    axis.plot(distance, values, color=colour, marker=".", linewidth=1.4, label=run.name)
                    axis.plot(distance[-1], values[-1], color=colour, marker="o", markersize=6)
        for axis, title in zip(axes, ("what is trained on (proxy)", "what is watched (gold)"), strict=True):
            axis.set(title=title, xlabel="√KL(policy ‖ reference), √nats a completion")
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("mean score of a step")
        axes[0].legend(frameon=False, fontsize=9)
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None, dpi=120)
    finally:
        pyplot.close(figure)


def _records(run: Path) -> list[dict[str, Any]]:
    if not (run / "metrics.jsonl").exists():
        raise RunError(f"{str(run)!r} is not a run folder with steps: it holds no metrics.jsonl.")
    records = read_metrics(run / "metrics.jsonl")
    if not records or kl_of_completion(records[0]) is None:
        raise RunError(
            f"{str(run)!r} did not measure how far its policy moved: train with a loss that has a KL term, or with "
            "--watch or --kl-budget."
        )
    return records


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Means of `window` neighbours; the first values are means of those so far."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]

"""Reward against distance: how the trained score and the watched one move as the policy leaves the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lossmith.errors import RunError
from lossmith.files import at_home, check_writable
from lossmith.training.guards import kl_of_completion
from lossmith.training.run import read_metrics

__all__ = ["plot_frontier", "read_steps"]

_PLOTTED = ("reward", "watch", "kl_ref", "tokens", "completions")  # numbers that the plot reads, where they are
_COLORS = ("#0b6e99", "#c4552d", "#3d7a3a", "#7b4fa3", "#8a6d00", "#555555")


def plot_frontier(runs: Sequence[Path], target: Path, smooth: int = 3) -> None:
    """Write an image (by its suffix: svg, png, pdf) of reward and watched score against sqrt(KL), a color a run.

    KL is that of a completion, nats, against the reference (the axis of arXiv:2210.10760). Each point is the mean of
    `smooth` steps, as every step has other prompts. RunError: no run, one without steps, or without a measured KL.
    """
    if not runs:
        raise RunError("give one run folder or more: lossmith plot runs/NAME -o frontier.svg")
    if target.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise RunError(f"{target}: the image is an .svg, .png or .pdf file.")
    if smooth < 1:
        raise RunError(f"smooth = {smooth}, but a point is the mean of at least one step.")
    target = check_writable(target)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 3.8), sharex=True, layout="constrained")
    try:
        for run, color in zip(runs, _COLORS * len(runs), strict=False):
            records = read_steps(at_home(run))
            for axis, key in zip(axes, ("reward", "watch"), strict=True):
                shown = [r for r in records if key in r]
                distance = _smooth([math.sqrt(max(0.0, kl_of_completion(r) or 0.0)) for r in shown], smooth)
                values = _smooth([r[key] for r in shown], smooth)
                if values:
                    axis.plot(distance, values, color=color, marker=".", linewidth=1.4, label=run.name)
                    axis.plot(distance[-1], values[-1], color=color, marker="o", markersize=6)
        for axis, title in zip(axes, ("what is trained on (proxy)", "what is watched (gold)"), strict=True):
            axis.set(title=title, xlabel="√KL(policy ‖ reference), √nats a completion")
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("mean score of a step")
        axes[0].legend(frameon=False, fontsize=9)
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None, dpi=120)
    finally:
        pyplot.close(figure)


def read_steps(run: Path) -> list[dict[str, Any]]:
    """The steps of a run whose distance was measured, as metrics.jsonl has them.

    RunError: there are none, or a line is no step. A last line that is still being written is left out.
    """
    file = run / "metrics.jsonl"
    if not file.exists():
        raise RunError(f"{str(run)!r} is not a run folder with steps: it holds no metrics.jsonl.")
    records = [_with_numbers(record, f"{file}: step {record['step']}") for record in read_metrics(file)]
    measured = [record for record in records if kl_of_completion(record) is not None]
    if not measured:
        raise RunError(
            f"{str(run)!r} did not measure how far its policy moved: train with a loss that has a KL term, or with "
            "--watch or --kl-budget."
        )
    return measured


def _with_numbers(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record, with finite numbers where the plot reads them."""
    try:
        numbers = {key: float(record[key]) for key in _PLOTTED if key in record}
    except (ValueError, TypeError, OverflowError) as error:
        raise RunError(f"{where}: it is no record of a step ({error}). Remove it, or plot another run.") from None
    if not all(map(math.isfinite, numbers.values())) or ("kl_ref" in numbers) > ("tokens" in numbers):
        raise RunError(f"{where}: a step has finite {', '.join(_PLOTTED)}. Remove the line, or plot another run.")
    return record | numbers


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Means of `window` neighbors; the first values are means of those so far."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]

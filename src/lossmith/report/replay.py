"""A replay to look at: pulls of the completions against their scores, and how alike the losses push."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from lossmith.errors import RunError
from lossmith.files import check_writable
from lossmith.replay import Replay

__all__ = ["plot_replay", "replay_to_dict"]

COLORS = ("#0b6e99", "#c4552d", "#3d7a3a", "#7b4fa3", "#8a6d00", "#555555")


def replay_to_dict(found: Replay) -> dict[str, Any]:
    """Everything of a replay in JSON types, pulls by completion included."""
    record, under = found.record, found.under_model
    names = [x.name for x in found.evaluated]
    return {
        "source": record.source,
        "place": record.place,
        "step": record.step,
        "completions": len(record),
        "tokens": int(record.fields["mask"].sum()),
        "fields": record.origin,
        "notes": list(record.notes),
        "effective_sample_size": found.effective_sample_size,
        "losses": [
            {
                "name": x.name,
                "refused": x.refused or None,
                "notes": list(x.notes),
                "loss": x.value,
                "advantage_gap": x.advantage_gap,
                "clip_fraction": x.clip_fraction,
                "without_pull": x.without_pull,
                "pull": None if x.by_completion is None else x.by_completion.tolist(),
            }
            for x in found.losses
        ],
        "pull_against_score": dict(zip(names, found.against("reward"), strict=True)),
        "pull_against_length": dict(zip(names, found.against("length"), strict=True)),
        "cosines": {"losses": names, "matrix": found.cosines.tolist()},
        "under_model": None
        if under is None
        else {
            "kl_behavior": under.kl_behavior,
            "ratio_percentiles_5_50_95": under.ratio,
            "effective_sample_size": under.effective_sample_size,
            "entropy": under.entropy,
            "grad_norm": under.grad_norm,
            "cosines": {"losses": list(under.grad_norm), "matrix": under.cosines.tolist()},
            "refused": under.refused,
        },
    }


def plot_replay(found: Replay, target: Path) -> None:
    """Write an image (svg, png, pdf): pull against score by completion, and cosines. RunError: nothing to draw."""
    if target.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise RunError(f"{target}: the image is an .svg, .png or .pdf file.")
    if not found.evaluated:
        raise RunError("none of the losses could be evaluated on this file: there is nothing to draw.")
    target = check_writable(target)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    try:
        _pulls(left, found)
        _heatmap(right, found)
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None, dpi=120)
    finally:
        pyplot.close(figure)


def _pulls(axis: Any, found: Replay) -> None:
    """Each loss's pulls, in units of its largest, so that losses of other scales can be compared."""
    fields = found.record.fields
    score = fields.get("reward")
    across = fields["mask"].sum(1).double() if score is None else score if score.ndim == 1 else score.sum(1)
    for x, color in zip(found.evaluated[: len(COLORS)], COLORS, strict=False):
        assert x.by_completion is not None
        pull = x.by_completion / x.by_completion.abs().max().clamp(min=1e-300)
        axis.scatter(across, pull, s=16, color=color, alpha=0.7, label=x.name, linewidths=0)
    axis.axhline(0, color="#999999", linewidth=0.8)
    axis.set(
        title=f"pull by completion (n = {len(found.record)})",
        xlabel="length, tokens" if score is None else "score",
        ylabel="Σ −dL/dlogp, share of the loss's largest",
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def _heatmap(axis: Any, found: Replay) -> None:
    names, cosines = [x.name for x in found.evaluated], found.cosines
    axis.imshow(cosines.tolist(), vmin=-1, vmax=1, cmap="RdBu")
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) <= 12:
        for i, j in itertools.product(range(len(names)), repeat=2):
            value = float(cosines[i, j])
            color = "white" if abs(value) > 0.6 else "black"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axis.set_title("cosine of the pulls")

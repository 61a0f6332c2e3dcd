"""What a reward model is worth: on prompts it has not seen, with intervals by prompt."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lossmith.intervals import Interval, share_across, share_of
from lossmith.reward_model.scored_texts import ScoredTexts

__all__ = ["Measured", "measure", "plot_measured"]

BINS = 5  # of confidence, from 0.5 to 1
_Pair = tuple[str, str, float, float]  # prompt and score of the better text, then of the worse: (p, q, a, b)


@dataclass(frozen=True)
class Measured:
    """Figures over held-out preferences. Pairs are those said, and those that rankings and ratings imply.

    accuracy    share of the pairs that the scores order as they were judged, by prompt; an equal score counts half
    log_loss    mean -ln σ(d) of the judged order, nats a pair
    calibration a row for each bin of confidence max(σ(d), σ(-d)): (mean confidence, share right, pairs)
    error       expected calibration error: mean |confidence - share right|, weighted by pairs
    lengths     Spearman's rank correlation of score and length in words, within what was held out
    scores      of every text, best-judged first in each comparison
    """

    accuracy: Interval
    log_loss: float
    calibration: list[tuple[float, float, int]]
    error: float
    lengths: float
    scores: list[float]
    chosen: list[float] = field(default_factory=list)  # scores of the better and the worse of each pair
    rejected: list[float] = field(default_factory=list)
    words: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        spread = statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0
        return {
            "accuracy": self.accuracy.as_dict(),
            "log_loss": _finite(self.log_loss),
            "calibration_error": _finite(self.error),
            "calibration": [list(row) for row in self.calibration],
            "length_correlation": _finite(self.lengths),
            "score_mean": statistics.fmean(self.scores),
            "score_std": spread,
            "pairs": len(self.chosen),
        }


def measure(examples: Sequence[ScoredTexts], scores: Sequence[Tensor]) -> Measured:
    """Hold scores [rows of each example] against what was said."""
    pairs = _pairs(examples, [s.tolist() for s in scores])
    gaps = [a - b for _, _, a, b in pairs]
    flat = [x for s in scores for x in s.tolist()]
    words = [n for e in examples for n in e.lengths]
    bins = _calibration(gaps)
    total = sum(count for _, _, count in bins)
    return Measured(
        _accuracy(pairs),
        statistics.fmean(_softplus(-gap) for gap in gaps) if gaps else math.nan,
        bins,
        sum(abs(said - right) * count for said, right, count in bins) / total if total else math.nan,
        _spearman(flat, words),
        flat,
        [a for _, _, a, _ in pairs],
        [b for _, _, _, b in pairs],
        words,
    )


def _accuracy(pairs: Sequence[_Pair]) -> Interval:
    outcomes = [(p, q, (a > b) + 0.5 * (a == b)) for p, q, a, b in pairs]
    if any(p != q for p, q, _ in outcomes):
        return share_across(outcomes)[0]
    by_prompt: dict[str, list[float]] = {}
    for prompt, _, value in outcomes:
        by_prompt.setdefault(prompt, []).append(value)
    return share_of([statistics.fmean(values) for values in by_prompt.values()], len(outcomes))


def _pairs(examples: Sequence[ScoredTexts], scores: list[list[float]]) -> list[_Pair]:
    """Pairs of a better and a worse text; ratings are paired within a prompt and annotator."""
    found: list[_Pair] = []
    rated: dict[tuple[str, str], list[tuple[float, float]]] = {}  # by prompt and annotator: scales are their own
    for e, s in zip(examples, scores, strict=True):
        if e.target is not None:
            rated.setdefault((e.prompt_id, e.annotator), []).append((e.target, s[0]))
        elif e.probability != 0.5:
            levels = zip(e.tiers, s, strict=True)
            found += [(e.prompt_id, e.prompt_id, x, y) for (i, x), (j, y) in itertools.combinations(levels, 2) if i < j]
    named = [[(name, *value) for value in values] for (name, _), values in rated.items()]
    several = any(len({target for _, target, _ in values}) > 1 for values in named)
    everyone = [[value for values in named for value in values]]
    for several_texts in named if several else everyone:  # thumbs on one text a prompt: across prompts
        for (p, i, x), (q, j, y) in itertools.combinations(several_texts, 2):
            if i != j:
                found.append((p, q, x, y) if i > j else (q, p, y, x))
    return found


def _calibration(gaps: Sequence[float]) -> list[tuple[float, float, int]]:
    rows: dict[int, list[tuple[float, float]]] = {}
    for gap in gaps:
        confidence = 1 / (1 + math.exp(-min(abs(gap), 50.0)))
        rows.setdefault(min(BINS - 1, int((confidence - 0.5) * 2 * BINS)), []).append((confidence, float(gap > 0)))
    return [
        (statistics.fmean(c for c, _ in row), statistics.fmean(right for _, right in row), len(row))
        for _, row in sorted(rows.items())
    ]


def _spearman(scores: Sequence[float], words: Sequence[int]) -> float:
    from scipy.stats import spearmanr

    if len(set(scores)) < 2 or len(set(words)) < 2:
        return math.nan
    return float(spearmanr(scores, words).statistic)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def plot_measured(measured: Measured, target: Path, name: str) -> None:
    """Reliability, the scores of better and worse texts, and score against length, as one image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    try:
        left.plot([0.5, 1], [0.5, 1], color="#999999", linewidth=1, linestyle="--")
        left.plot([row[0] for row in measured.calibration], [row[1] for row in measured.calibration], marker="o")
        for said, share, count in measured.calibration:
            left.annotate(f"{count}", (said, share), textcoords="offset points", xytext=(4, -10), fontsize=8)
        left.set(title="reliability", xlabel="confidence σ(|d|)", ylabel="share right", ylim=(0, 1.05))
        if measured.chosen:
            middle.hist([measured.chosen, measured.rejected], bins=20, label=["better", "worse"])
            middle.legend(frameon=False)
        middle.set(title="scores on held-out prompts", xlabel="score", ylabel="texts")
        right.scatter(measured.words, measured.scores, s=8, alpha=0.6)
        right.set(title=f"length (Spearman {measured.lengths:+.2f})", xlabel="words", ylabel="score")
        for axis in (left, middle, right):
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(name)
        figure.savefig(target, metadata={"Date": None})
    finally:
        pyplot.close(figure)

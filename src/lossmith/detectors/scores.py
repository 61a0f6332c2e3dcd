"""The scorer: numbers that cannot be rewards, failures, a ceiling, and whether it says the same twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lossmith.detectors.evidence import Evidence
from lossmith.detectors.finding import Detector, NotChecked, Sign
from lossmith.detectors.series import WINDOW, begun, in_steps, longest, windows

__all__ = ["DETECTORS"]

HUGE = 1e6  # a reward that large leaves float32 three digits for differences below it once it is averaged and squared
OUTLIER = 50.0  # standard deviations of the other scores: one such completion decides the step's mean and gradient
FEWEST = 16  # completions below which a standard deviation says little of the tails
FAILED_WARN = 0.1  # of completions: those left are no longer a random part of what was sampled
FAILED_STOP = 0.9  # nothing to speak of is learned from the rest
SATURATED = 0.9  # of a step's scores at the highest one ever seen
DRIFT_SHARE = 0.25  # of the change that the run claims, or of the scores' spread: what a drift may make up of it
EXTRAPOLATES = 2.0  # standard deviations: 98% of the texts that a reward model was trained on score less


def _odd(evidence: Evidence) -> Sign | None:
    least = dict(evidence.series("score_least", "reward"))
    largest = [(step, max(abs(least.get(step, 0.0)), abs(v))) for step, v in evidence.series("score_most", "reward")]
    steps = tuple(step for step, v in largest if v > HUGE)
    n = int(sum(v for _, v in evidence.series("completions")))
    if steps:
        most = max(v for _, v in largest)
        sentence = (
            f"scores as large as {most:.3g} {in_steps(steps)}: the loss or its gradient loses all else beside them"
        )
        return Sign("warn", sentence, most, n, "scores", steps, evidence.places("score_most", steps))
    counts = dict(evidence.series("completions"))
    far = [(step, v) for step, v in evidence.series("score_outlier") if v > OUTLIER and counts.get(step, 0) >= FEWEST]
    if not far:
        return None
    most = max(v for _, v in far)
    steps = tuple(s for s, _ in far)
    sentence = (
        f"one score lies {most:.0f} standard deviations from the others of its step ({in_steps(steps)}): that "
        "completion decides the gradient"
    )
    return Sign("warn", sentence, most, n, "scores", steps, evidence.places("score_outlier", steps))


def _failing(evidence: Evidence) -> Sign | None:
    dropped, scored = dict(evidence.series("dropped")), dict(evidence.series("completions"))
    series = [(s, dropped[s] / (dropped[s] + scored.get(s, 0.0))) for s in dropped if dropped[s] + scored.get(s, 0.0)]
    n = sum(dropped.values()) + sum(scored.get(s, 0.0) for s in dropped)
    share = sum(dropped.values()) / max(n, 1)
    stretch = longest(series, lambda v: v >= FAILED_STOP)
    if n < FEWEST or (share < FAILED_WARN and len(stretch) < WINDOW):
        return None
    steps = tuple(s for s, v in series if v)
    level: Any = "stop" if len(stretch) >= WINDOW else "warn"
    sentence = f"the scorer gave no score to {sum(dropped.values()):.0f} of {n:.0f} completions ({share:.0%})"
    return Sign(level, sentence, share, int(n), "completions", steps, evidence.places("dropped", steps))


def _saturated(evidence: Evidence) -> Sign | None:
    tops, shares = evidence.series("score_most"), dict(evidence.series("score_at_most"))
    spread = dict(evidence.series("reward_std"))
    ceiling = max(v for _, v in tops)
    at = [(s, shares.get(s, 0.0) if v >= ceiling and spread.get(s, 1.0) > 0 else float(v >= ceiling)) for s, v in tops]
    stretch = longest(at, lambda v: v >= SATURATED)
    if len(stretch) < WINDOW or begun(at) >= SATURATED:  # from the start: the scorer is constant, or nearly
        return None
    share = at[-1][1] if at[-1][0] == stretch[-1] else dict(at)[stretch[-1]]
    n = int(dict(evidence.series("completions")).get(stretch[-1], 0))
    sentence = (
        f"the scores are at their ceiling: {in_steps(stretch)} at least {SATURATED:.0%} of the completions scored "
        f"{ceiling:g}, the highest score seen"
    )
    return Sign("note", sentence, share, n, "completions of the last of these steps", stretch)


def _drifting(evidence: Evidence) -> Sign | NotChecked | None:
    again = evidence.rescored
    if again is None:
        return NotChecked("the first texts were not scored again at the end")
    n, change, spread = again["n"], again["change"], again["spread"]
    if not n or not again["changed"]:
        return None
    steps = tuple(s.index for s in evidence.steps[-1:])
    low, high = change["ci95_low"], change["ci95_high"]
    shifted = low is None or low > 0 or high < 0
    claimed = abs(again.get("claimed") or 0.0)
    matters = abs(change["mean"]) >= DRIFT_SHARE * max(min(claimed, spread), 1e-12)
    if shifted and matters and n > 1:
        sentence = (
            f"the scorer gave other scores to the same {n} texts: {change['mean']:+.3g} on average since the start. "
            "Scores before and after cannot be compared"
        )
        return Sign("warn", sentence, change["mean"], n, "texts", steps)
    sentence = (
        f"the scorer gave other scores to {again['changed']} of the same {n} texts, {again['mean_absolute']:.3g} apart "
        f"on average (the scores' own spread is {spread:.3g}), without a drift that shows"
    )
    return Sign("note", sentence, again["mean_absolute"], n, "texts", steps)


def _stale(evidence: Evidence) -> Sign | NotChecked | None:
    if evidence.reward_scale is None:
        return NotChecked("the scorer is no reward model of `lossmith reward train`, whose range is known")
    mean, std = evidence.reward_scale
    ends = windows([(step, (v - mean) / std) for step, v in evidence.series("reward")])
    far = [(step, v) for step, v in ends if v > EXTRAPOLATES]
    if not far:
        return None
    step, most = max(far, key=lambda pair: pair[1])
    sentence = (
        f"the reward model is asked beyond what it knows: by step {step + 1} the mean score is {most:.1f} standard "
        "deviations above that of the texts it was trained on"
    )
    return Sign("warn", sentence, most, len(evidence.steps), "steps", tuple(s for s, _ in far),
                evidence.places("score_most", [s for s, _ in far]))  # fmt: skip


def spread_of(values: Sequence[float]) -> float:
    """Standard deviation, 0 of fewer than two."""
    mean = math.fsum(values) / max(len(values), 1)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))


DETECTORS: Sequence[Detector] = (
    Detector(
        "odd_scores",
        "scores that no gradient can carry, or one that outweighs all others",
        f"a score beyond {HUGE:g}, or {OUTLIER:g} standard deviations from the other scores of its step",
        ("score_most|reward",),
        _odd,
        "the scorer divides by something near 0, returns a log-probability of nothing, or is not bounded",
        "bound the scorer's numbers, or scale them (shaping='clip' or 'scale', advantage_scale='group_std')",
        "arXiv:1909.08593",
    ),
    Detector(
        "failing_scorer",
        "the scorer gives no score",
        f"{FAILED_WARN:.0%} of all completions (stop: {FAILED_STOP:.0%} in {WINDOW} steps in a row)",
        ("dropped",),
        _failing,
        "the scorer fails on some texts (its error is shown), times out, or abstains",
        "mend the scorer for the completions shown; what it cannot judge is not learned, in whichever direction",
    ),
    Detector(
        "saturated_scores",
        "nearly every completion has the highest score",
        f"{SATURATED:.0%} of a step's scores at the highest one seen, {WINDOW} steps in a row, and fewer at the start",
        ("score_at_most", "score_most"),
        _saturated,
        "the policy does all that this scorer can see",
        "stop here, take harder prompts, or use a scorer that still tells these completions apart",
        "arXiv:2503.14476",
        WINDOW + 1,
    ),
    Detector(
        "scorer_drift",
        "the scorer gives the same text another score at the end than at the start",
        f"another mean, its 95% interval without 0, of at least {DRIFT_SHARE:.0%} of the change that the run claims; "
        "note: other scores without a drift",
        (),
        _drifting,
        "the scorer keeps state, draws random numbers, or asks a model or a server that has changed",
        "make the scorer a function of prompt and completion alone: fix its seed, its model's version, temperature 0",
        "arXiv:2306.05685",
        voids="warn",
    ),
    Detector(
        "stale_reward_model",
        "the policy writes what the reward model was not trained on",
        f"the mean score, over {WINDOW} steps, more than {EXTRAPOLATES:g} standard deviations above that of its "
        "training texts",
        ("reward",),
        _stale,
        "the policy has moved away from the texts that were judged; there the reward model guesses",
        "judge completions of the present policy and train the reward model again, or hold the policy nearer (beta, "
        "kl_budget)",
        "arXiv:2210.10760",
        WINDOW,
    ),
)  # fmt: skip

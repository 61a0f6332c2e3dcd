"""Gradients and weights: steps that explode, get lost, or are too small to matter; a reference that moves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from lossmith.detectors.evidence import Evidence
from lossmith.detectors.finding import Detector, NotChecked, Sign
from lossmith.detectors.series import WINDOW, in_steps, longest
from lossmith.detectors.signal import without_signal

__all__ = ["DETECTORS"]

SPIKE = 10.0  # times the median of the steps before: heavy tails of small batches reach 3 to 5
MEDIAN_OF = 20  # steps before
FEWEST_NORMS = 5  # below which a median says little
SKIPPED_STOP = 0.5  # of at least SKIPPED_OF steps: what is left is no run
SKIPPED_OF = 6
LARGE_WARN = 0.1  # of the weights' own size in one step; usual are 0.0001 to 0.01
LARGE_STOP = 1.0  # nothing of what the weights were is left
SMALL = 1e-3  # of the weights in bfloat16: the policy computes with the others as if there had been no step
SMALL_STEPS = 5
WENT = 0.01  # of the weights in bfloat16: with fewer, KL may be 0 by rounding


def _spike(evidence: Evidence) -> Sign | None:
    series = [(step, v) for step, v in evidence.series("grad_norm") if v > 0]
    spikes = []
    for i, (step, value) in enumerate(series):
        before = [v for _, v in series[max(0, i - MEDIAN_OF) : i]]
        if len(before) >= FEWEST_NORMS and value > SPIKE * statistics.median(before):
            spikes.append((step, value / statistics.median(before), value))
    if not spikes:
        return None
    step, times, value = max(spikes, key=lambda spike: spike[1])
    steps = tuple(s for s, _, _ in spikes)
    sentence = (
        f"the gradient was {times:.0f} times its usual length in step {step + 1} ({value:.3g}; the median of the steps "
        f"before is {value / times:.3g}){f', and {in_steps(steps)} it leapt' if len(steps) > 1 else ''}"
    )
    return Sign("warn", sentence, times, len(series), "steps", steps, evidence.places("score_outlier", [step]))


def _not_finite(evidence: Evidence) -> Sign | None:
    skipped = [(s, v) for s, v in evidence.series("skipped_updates") if v]
    broken = {s.index: sorted(k for k, v in s.numbers.items() if not math.isfinite(v)) for s in evidence.steps}
    broken = {step: names for step, names in broken.items() if names}
    steps = tuple(sorted({s for s, _ in skipped} | broken.keys()))
    if not steps:
        return None
    n = len(evidence.steps)
    lost = int(sum(v for _, v in skipped))
    what = [f"{lost} update{'s' * (lost != 1)} skipped, as the gradient was not finite"] if lost else []
    if broken:
        names = sorted({name for found in broken.values() for name in found})
        what.append(f"{', '.join(names[:3])} not finite")
    sentence = f"{' and '.join(what)}, {in_steps(steps)} of {n}"
    level: Any = "stop" if n >= SKIPPED_OF and len(steps) >= SKIPPED_STOP * n else "warn"
    return Sign(level, sentence, len(steps), n, "steps", steps, evidence.places("score_most", steps))


def _too_large(evidence: Evidence) -> Sign | None:
    large = [(s, v) for s, v in evidence.series("weight_step") if v > LARGE_WARN]
    if not large:
        return None
    step, most = max(large, key=lambda pair: pair[1])
    rate = evidence.setting("learning_rate")
    told = f" (learning_rate = {rate:g})" if isinstance(rate, float) else ""
    sentence = f"the weights moved by {most:.0%} of their own size in step {step + 1}{told}"
    level: Any = "stop" if most > LARGE_STOP else "warn"
    return Sign(level, sentence, most, len(evidence.steps), "steps", tuple(s for s, _ in large))


def _too_small(evidence: Evidence) -> Sign | NotChecked | None:
    if evidence.dtype != "bfloat16":
        return NotChecked(
            "the policy does not compute in bfloat16" if evidence.dtype else "the compute type is unknown"
        )
    moved = evidence.series("weights_moved")
    if len(moved) < SMALL_STEPS:
        return None
    step, share = moved[-1]
    if not 0 < share < SMALL:
        return None
    sentence = (
        f"after {len(moved)} steps {share:.3%} of the weights differ from where they began in bfloat16, in which the "
        "policy computes: it is nearly the same policy"
    )
    return Sign("warn", sentence, share, len(moved), "steps", (step,))


def _unmoved(evidence: Evidence) -> Sign | None:
    still = longest(
        [
            (s.index, float(s.finite["weight_step"] == 0))
            for s in evidence.steps
            if "weight_step" in s.finite and not s.finite.get("skipped_updates") and not without_signal(s.finite)
        ],
        bool,
    )
    if len(still) < 2:
        return None
    sentence = f"the weights did not move {in_steps(still)}, though there was something to learn: largest change 0"
    level: Any = "stop" if len(still) >= SMALL_STEPS else "warn"
    return Sign(level, sentence, 0.0, len(evidence.steps), "steps", still)


def _reference(evidence: Evidence) -> Sign | None:
    moved = [(s, v) for s, v in evidence.series("reference_moved") if v > 0]
    if moved:
        step, share = moved[0]
        sentence = f"the reference moved: in step {step + 1} {share:.1%} of its weights are not what they were"
        return Sign("stop", sentence, share, len(evidence.steps), "steps", tuple(s for s, _ in moved))
    # a reference that is the policy itself moves along: KL stays 0 however far the weights go
    went = {s for s, v in evidence.series("weights_moved") if v >= WENT}
    later = [(s, v) for s, v in evidence.series("kl") if any(w < s for w in went)]
    along = longest(later, lambda v: v == 0.0)
    if len(along) < WINDOW:
        return None
    sentence = (
        f"KL to the reference is exactly 0 {in_steps(along)} although the weights moved: the reference moves along"
    )
    return Sign("stop", sentence, 0.0, len(later), "steps", along)


DETECTORS: Sequence[Detector] = (
    Detector(
        "gradient_spike",
        "a gradient far longer than usual",
        f"{SPIKE:g} times the median of the {MEDIAN_OF} steps before (at least {FEWEST_NORMS})",
        ("grad_norm",),
        _spike,
        "a score far from the others, one token with a huge ratio or KL, or a policy that is about to leave its range",
        "look at the step's completions; lower max_grad_norm or learning_rate, bound the scores (shaping='clip')",
        "arXiv:2504.02507",
        FEWEST_NORMS + 1,
    ),
    Detector(
        "non_finite",
        "gradients or figures that are no numbers",
        f"any (stop: {SKIPPED_STOP:.0%} of at least {SKIPPED_OF} steps; three updates in a row end a run at once)",
        ("skipped_updates|grad_norm",),
        _not_finite,
        "overflow: rewards or ratios that are too large, or weights that are",
        "lower learning_rate, bound the scores (shaping='clip'), or compute in float32 (dtype)",
    ),
    Detector(
        "step_too_large",
        "one step moves the weights by more than a fraction of their size",
        f"{LARGE_WARN:.0%} of their root mean square (stop: {LARGE_STOP:.0%})",
        ("weight_step",),
        _too_large,
        "AdamW moves every weight by about learning_rate in one update, whatever the gradient, and updates add up",
        "lower learning_rate (usual is 1e-6 to 1e-4), or make fewer updates a step (epochs, updates_per_step)",
        "arXiv:1412.6980",
        voids="stop",
    ),
    Detector(
        "step_too_small",
        "the steps are lost in bfloat16",
        f"after {SMALL_STEPS} steps, less than {SMALL:.1%} of the weights differ in bfloat16 from where they began",
        ("weights_moved",),
        _too_small,
        "learning_rate is far below the spacing of bfloat16 (about 1/256 of a weight)",
        "raise learning_rate, or compute in float32 (dtype)",
        "arXiv:2010.06192",
        SMALL_STEPS,
    ),
    Detector(
        "weights_unmoved",
        "updates that change nothing",
        f"no weight changed in 2 steps in a row (stop: {SMALL_STEPS})",
        ("weight_step",),
        _unmoved,
        "a learning rate of 0 (a schedule at its end), frozen weights, or a gradient of 0",
        "look at learning_rate and grad_norm in metrics.jsonl, and that the model's weights are trainable",
        least=2,
    ),
    Detector(
        "reference_moved",
        "the anchor of the KL moves",
        f"any of its weights changed, or a KL of exactly 0 in {WINDOW} steps in a row after {WENT:.0%} of the policy's "
        "did (stop)",
        ("reference_moved|weights_moved",),
        _reference,
        "the reference shares its weights with the policy, or was loaded again from it",
        "keep a copy of the reference of its own",
        "arXiv:1909.08593",
    ),
)  # fmt: skip

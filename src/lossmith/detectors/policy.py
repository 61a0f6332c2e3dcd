"""What has become of the policy: its entropy, and how far it is from where it began."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from lossmith.detectors.evidence import Evidence
from lossmith.detectors.finding import Detector, NotChecked, Sign
from lossmith.detectors.series import WINDOW, begun, windows

__all__ = ["DETECTORS", "fall"]

FALLEN_WARN = 0.2  # of the entropy at the start: runs that go on learning keep more of it
FALLEN_STOP = 0.05  # next to nothing is tried any more, and what is not tried is not learned
SURE = 0.1  # nats a token: above it there are still several ways to go on at every tenth token
UNIFORM = 0.9  # of log V: sampling is all but drawing tokens at random
ASKED = 2.0  # standard errors, of a stop that somebody asked for (watch_window)
UNASKED = 3.0  # of a warning that nobody asked for, beyond the best of many windows


def _collapse(evidence: Evidence) -> Sign | None:
    series = evidence.series("entropy", "sampled_entropy")
    first = begun(series)
    low = [(step, v) for step, v in windows(series) if v < FALLEN_WARN * first and v < 10 * SURE]
    if not low or first < SURE:
        return None
    step, least = min(low, key=lambda pair: pair[1])
    level: Any = "stop" if least < FALLEN_STOP * first and least < SURE else "warn"
    kl = dict(evidence.series("kl")).get(step)
    far = "" if kl is None else f"; it is {kl:.2f} nats a completion from the reference"
    what = "the policy hardly varies what it writes" if level == "warn" else "the policy writes one text for a prompt"
    sentence = f"entropy fell from {first:.2f} to {max(least, 0.0):.2f} nats a token by step {step + 1}: {what}{far}"
    return Sign(
        level, sentence, least, len(series), "steps", tuple(s for s, _ in low), evidence.places("reward", [step])
    )


def _noise(evidence: Evidence) -> Sign | NotChecked | None:
    if not evidence.vocabulary:
        return NotChecked("how many tokens the model has is not known")
    most = math.log(evidence.vocabulary)
    high = [(step, v) for step, v in windows(evidence.series("entropy", "sampled_entropy"), 2) if v > UNIFORM * most]
    if not high:
        return None
    step, value = high[-1]
    sentence = (
        f"the policy is uniform noise: its entropy is {value:.2f} nats a token by step {high[0][0] + 1}, and the most "
        f"there can be is log {evidence.vocabulary} = {most:.2f}"
    )
    return Sign("stop", sentence, value, len(evidence.steps), "steps", tuple(s for s, _ in high),
                evidence.places("reward", [step]))  # fmt: skip


def fall(seen: Sequence[tuple[float, float]], window: int, errors: float, looks: bool) -> tuple[float, float] | None:
    """(best, now) where the mean of the last `window` of (mean, its variance) lies surely below the best one before.

    Surely: by `errors` standard errors of their difference; with `looks`, by as much more as the best of so many
    windows of pure noise lies above their mean, sqrt(2 log windows) standard errors of one.
    """
    if len(seen) < 2 * window:
        return None
    before = [_mean(seen[i : i + window]) for i in range(len(seen) - 2 * window + 1)]
    (best, best_variance), (now, variance) = max(before), _mean(seen[-window:])
    luck = math.sqrt(2 * math.log(len(before)) * best_variance) if looks else 0.0
    return (best, now) if best - now > errors * math.sqrt(best_variance + variance) + luck else None


def _mean(steps: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(mean, its variance) over steps whose prompts differ."""
    return statistics.fmean(m for m, _ in steps), sum(v for _, v in steps) / len(steps) ** 2


def _watched(evidence: Evidence) -> Sign | None:
    asked = evidence.setting("watch_window") or 0
    window = asked or WINDOW
    variance = dict(evidence.series("watch_variance"))
    known = [(step, v) for step, v in evidence.series("watch") if variance.get(step, -1.0) >= 0]
    seen = [(v, variance[step]) for step, v in known]
    for end in range(2 * window, len(seen) + 1):
        fell = fall(seen[:end], window, ASKED if asked else UNASKED, looks=not asked)
        if fell is not None:
            break
    else:
        return None
    best, now = fell
    sentence = (
        f"over-optimized: the watched score fell from {best:.3f} to {now:.3f} by step {known[end - 1][0] + 1} while "
        f"the reward was trained on (means over {window} steps; more than {ASKED if asked else UNASKED:g} standard "
        "errors)"
    )
    return Sign("stop" if asked else "warn", sentence, now - best, len(seen), "steps", (known[end - 1][0],))


def _budget(evidence: Evidence) -> Sign | NotChecked | None:
    budget = evidence.setting("kl_budget")
    if budget is None:
        return NotChecked("no kl_budget is set")
    over = [(step, v) for step, v in evidence.series("kl") if v > budget]
    if not over:
        return None
    step, value = over[0]
    sentence = f"KL budget spent: the policy is {value:.2f} nats a completion from the reference ({budget:g})"
    n = int(dict(evidence.series("completions")).get(step, 0))
    return Sign("stop", sentence, value, n, "completions", tuple(s for s, _ in over))


DETECTORS: Sequence[Detector] = (
    Detector(
        "entropy_collapse",
        "the policy has one answer for everything",
        f"entropy, over {WINDOW} steps, below {FALLEN_WARN:.0%} of that of the first steps (stop: {FALLEN_STOP:.0%}, "
        f"and below {SURE:g} nats a token)",
        ("entropy|sampled_entropy",),
        _collapse,
        "a step size that is too large, no force that keeps the policy varied, or a reward that one text satisfies",
        "lower learning_rate, add a KL term (beta) or an entropy bonus (entropy_coef), or clip upwards less tightly "
        "(clip_high)",
        "arXiv:2505.22617",
        WINDOW + 1,
        voids="stop",
    ),
    Detector(
        "uniform_noise",
        "the policy draws tokens at random",
        f"entropy above {UNIFORM:.0%} of the logarithm of the vocabulary, over 2 steps",
        ("entropy|sampled_entropy",),
        _noise,
        "a step size that has destroyed the weights, a temperature that drowns them, or an untrained model",
        "lower learning_rate or temperature, and begin again from the model's own weights",
        least=2,
        voids="stop",
    ),
    Detector(
        "watched_falls",
        "the reward is trained on, and the score that only watches falls",
        f"its mean over {WINDOW} steps {UNASKED:g} standard errors (and the luck of the best of so many) below "
        f"the best before; with watch_window: over as many steps, {ASKED:g} standard errors (stop)",
        ("watch",),
        _watched,
        "the policy has found what the scorer rewards and nobody wanted (Goodhart)",
        "stop where the watched score was best, hold the policy nearer (beta, kl_budget), or mend the scorer",
        "arXiv:2210.10760",
        2,
        asked_by="watch_window",
    ),
    Detector(
        "kl_budget",
        "the policy is further from the reference than it was allowed",
        "kl above kl_budget (stop)",
        (),
        _budget,
        "the run has moved as far as its budget goes",
        "take this policy, raise kl_budget, or hold the policy nearer with a KL term (beta)",
        "arXiv:2210.10760",
        asked_by="kl_budget",
    ),
)  # fmt: skip

"""Made-up runs: healthy ones, and for every detector the fault that it is there for.

A healthy run is a policy that learns: a few prompts a step, several completions each, scores that rise, advantages that
follow them, and the figures that a learner writes, with the scatter of small batches. A fault changes what the illness
changes, and leaves the rest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lossmith.detectors.diagnosis import DETECTORS
from lossmith.detectors.evidence import Completion, Evidence, StepSeen
from lossmith.detectors.finding import Finding
from lossmith.detectors.measuring import measure
from lossmith.intervals import mean_of

__all__ = ["FAULTS", "Made", "false_alarms", "found", "healthy"]

WORDS = [f"word{i}" for i in range(80)]
PROMPTS, SAMPLES, BUDGET, VOCABULARY = 4, 6, 40, 50_000


@dataclass
class Made:
    """A made-up run before it becomes evidence: what a fault changes."""

    rng: np.random.Generator
    completions: list[list[Completion]]
    metrics: list[dict[str, float]]
    settings: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)  # other fields of Evidence

    def each(self, change: Callable[[int, Completion], Completion]) -> None:
        """Change every completion, given how far the run is (0 to 1)."""
        last = max(len(self.completions) - 1, 1)
        for i, step in enumerate(self.completions):
            self.completions[i] = [change(round(100 * i / last), c) for c in step]

    def metric(self, name: str, value: Callable[[int, float], float]) -> None:
        """Change a number of every step, given the step and what it was."""
        for i, numbers in enumerate(self.metrics):
            numbers[name] = value(i, numbers.get(name, 0.0))

    def evidence(self) -> Evidence:
        steps = []
        for i, (completions, metrics) in enumerate(zip(self.completions, self.metrics, strict=True)):
            numbers, places = measure(i, completions)
            steps.append(StepSeen(i, numbers | metrics, places))
        return Evidence(steps, self.settings, **self.more)


def healthy(seed: int, steps: int = 12, bfloat16: bool = False) -> Made:
    """A run that learns. bfloat16: its sampler is as far from its learner as rounding makes it."""
    rng = np.random.default_rng([seed, 17])
    settings = {
        "updates_per_step": 2, "epochs": 2, "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES,
        "max_tokens": BUDGET, "learning_rate": 4e-5, "kl_budget": 50.0,
    }  # fmt: skip
    gains = rng.uniform(0.5, 2.0)
    completions, metrics = [], []
    for i in range(steps):
        done = i / max(steps - 1, 1)
        completions.append([c for p in range(PROMPTS) for c in _group(rng, f"{i}-{p}", gains * done)])
        metrics.append(_metrics(rng, i, done, bfloat16))
    scores = rng.normal(0, 1, 24)
    again = {"n": 24, "changed": 0, "change": mean_of([0.0] * 24).as_dict(), "mean_absolute": 0.0, "spread": 1.0}
    more = {
        "vocabulary": VOCABULARY, "rescored": again | {"claimed": gains, "spread": float(scores.std())},
        "dtype": "bfloat16" if bfloat16 else "float32", "reward_scale": (0.0, 1.5),
    }  # fmt: skip
    return Made(rng, completions, metrics, settings, more)


def _group(rng: np.random.Generator, prompt: str, gain: float) -> list[Completion]:
    """The completions of one prompt, some too hard or too easy for any difference."""
    level = rng.normal(gain, 0.5)
    constant = rng.random() < 0.2
    texts = [rng.integers(len(WORDS), size=rng.integers(13, BUDGET + 6)).tolist() for _ in range(SAMPLES)]
    scores = [float(level)] * SAMPLES if constant else [float(x) for x in level + rng.normal(0, 0.6, SAMPLES)]
    mean, spread = float(np.mean(scores)), float(np.std(scores))
    one, other = (WORDS[k] for k in rng.integers(len(WORDS), size=2))
    asked = f"{prompt}: what do {one} and {other} have in common?"
    made = []
    for k, (text, score) in enumerate(zip(texts, scores, strict=True)):
        ids = text[:BUDGET]
        made.append(
            Completion(
                prompt,
                asked,
                k,
                " ".join(WORDS[i] for i in ids),
                ids,
                len(text) > BUDGET,
                score,
                advantage=0.0 if constant else (score - mean) / (spread + 1e-4),
                behavior_logp=(-rng.exponential(1.8, len(ids))).tolist(),
            )
        )
    return made


def _metrics(rng: np.random.Generator, i: int, done: float, bfloat16: bool) -> dict[str, float]:
    """What a learner writes, with the scatter that small batches have."""
    above = float(rng.uniform(0.01, 0.08))
    gap = 0.03 if bfloat16 else 1e-6
    return {
        "entropy": float(1.9 * (1 - 0.4 * done) * rng.uniform(0.9, 1.1)),
        "grad_norm": float(rng.lognormal(0, 0.4)),
        "skipped_updates": 0.0,
        "kl": float(3 * done * rng.uniform(0.7, 1.3)),
        "kl_update": float(0.02 * rng.uniform(0.5, 2)),
        "clipped_above": above,
        "clipped_below": float(above * rng.uniform(0.2, 2.0)),
        "sampler_gap": float(gap * rng.uniform(0.9, 1.1)),
        "sampler_outside": 0.108 if bfloat16 else 0.0,
        "ess": float(1 - rng.uniform(0.0, 0.03)),
        "tokens": float(PROMPTS * SAMPLES * 26),
        "weight_step": float(8e-4 * rng.uniform(0.8, 1.2)),
        "weights_moved": float(0.15 * math.sqrt(i + 1)),
        "reference_moved": 0.0,
        "watch": float(0.5 + 0.2 * done + rng.normal(0, 0.05)),
        "watch_variance": 0.05**2,
    }


# -- faults -----------------------------------------------------------------------------------------------------------


def _score(made: Made, of: Callable[[int, Completion], float | None]) -> None:
    made.each(lambda done, c: dataclasses.replace(c, score=of(done, c)))


def _constant_scorer(made: Made) -> None:
    made.each(lambda _, c: dataclasses.replace(c, score=0.5, advantage=0.0))


def _no_signal(made: Made) -> None:
    made.each(lambda _, c: dataclasses.replace(c, score=float(sum(map(ord, c.prompt))), advantage=0.0))


def _advantage_sign(made: Made) -> None:
    made.each(lambda _, c: dataclasses.replace(c, advantage=-(c.advantage or 0.0)))


def _no_gradient(made: Made) -> None:
    made.metric("grad_norm", lambda i, _: 0.0)


def _odd_scores(made: Made) -> None:
    at = int(made.rng.integers(len(made.completions)))
    step = made.completions[at]
    step[0] = dataclasses.replace(step[0], score=1e30)


def _failing_scorer(made: Made) -> None:
    def lost(_: int, c: Completion) -> Completion:
        fails = made.rng.random() < 0.5
        return dataclasses.replace(c, score=None, advantage=None, error="raised: no answer found") if fails else c

    made.each(lost)


def _saturated_scores(made: Made) -> None:
    _score(
        made, lambda done, c: 1.0 if done > 40 and (c.sample or made.rng.random() > 0.3) else min(c.score or 0, 0.99)
    )


def _scorer_drift(made: Made) -> None:
    changes = made.rng.normal(1.5, 0.7, 24)
    made.more["rescored"] |= {
        "changed": 24, "change": mean_of(changes.tolist()).as_dict(), "mean_absolute": float(abs(changes).mean()),
    }  # fmt: skip


def _stale_reward_model(made: Made) -> None:
    _score(made, lambda done, c: (c.score or 0) + 0.06 * done)


def _entropy_collapse(made: Made) -> None:
    half = len(made.metrics) // 2
    made.metric("entropy", lambda i, was: was if i < half else was * 0.1 ** (i - half + 1))


def _uniform_noise(made: Made) -> None:
    at = int(made.rng.integers(2, len(made.metrics) - 2))
    made.metric("entropy", lambda i, was: was if i < at else math.log(VOCABULARY) - made.rng.uniform(0, 0.1))


def _watched_falls(made: Made) -> None:
    half = len(made.metrics) // 2
    made.metric("watch", lambda i, was: was if i < half else was - 0.08 * (i - half + 1))


def _kl_budget(made: Made) -> None:
    made.metric("kl", lambda i, was: was * 40)


def _length_drift(made: Made) -> None:
    def shorter(done: int, c: Completion) -> Completion:
        keep = max(2, round(len(c.ids or ()) * (1 - done / 105)))
        words = (c.text or "").split()[:keep]
        return dataclasses.replace(c, text=" ".join(words), ids=(c.ids or ())[:keep], truncated=False)

    made.each(shorter)


def _truncation(made: Made) -> None:
    made.each(lambda _, c: dataclasses.replace(c, truncated=True))


def _empty(made: Made) -> None:
    made.each(lambda _, c: dataclasses.replace(c, text="", ids=[0], behavior_logp=[-0.1], truncated=False))


def _duplicates(made: Made) -> None:
    def copied(done: int, c: Completion) -> Completion:
        return dataclasses.replace(c, text="the same") if done > 50 and made.rng.random() < 0.8 else c

    made.each(copied)


def _repetitive(made: Made) -> None:
    def loop(done: int, c: Completion) -> Completion:
        if done < 40 or made.rng.random() < 0.15:
            return c
        ids = list(c.ids or ())
        return dataclasses.replace(c, ids=(ids[:3] * len(ids))[: len(ids)])

    made.each(loop)


def _odd_prompts(made: Made) -> None:
    made.each(lambda _, c: dataclasses.replace(c, prompt_text=c.prompt_text + "\x00") if c.prompt.endswith("1") else c)


def _ratio_one(made: Made) -> None:
    made.metric("kl_update", lambda i, _: 0.0)


def _mostly_clipped(made: Made) -> None:
    made.metric("clipped_above", lambda i, _: made.rng.uniform(0.3, 0.4))
    made.metric("clipped_below", lambda i, _: made.rng.uniform(0.28, 0.35))


def _one_sided(made: Made) -> None:
    made.metric("clipped_below", lambda i, _: 0.0)
    made.metric("clipped_above", lambda i, _: made.rng.uniform(0.05, 0.15))


def _ess(made: Made) -> None:
    made.metric("ess", lambda i, was: max(0.02, was - 0.12 * i))


def _sampler_gap(made: Made) -> None:
    made.metric("sampler_gap", lambda i, was: 0.02 + 0.03 * i * made.rng.uniform(0.8, 1.2))


def _gradient_spike(made: Made) -> None:
    at = int(made.rng.integers(6, len(made.metrics)))
    made.metric("grad_norm", lambda i, was: 60.0 if i == at else was)


def _non_finite(made: Made) -> None:
    at = int(made.rng.integers(len(made.metrics)))
    made.metric("skipped_updates", lambda i, was: float(i == at))
    made.metric("loss", lambda i, was: math.nan if i == at else 0.1)


def _too_large(made: Made) -> None:
    made.metric("weight_step", lambda i, was: was * 2000)


def _too_small(made: Made) -> None:
    made.more["dtype"] = "bfloat16"
    made.metric("weights_moved", lambda i, was: 4e-5 * (i + 1))
    made.metric("weight_step", lambda i, was: was * 1e-4)


def _unmoved(made: Made) -> None:
    made.metric("weight_step", lambda i, _: 0.0)


def _reference(made: Made) -> None:
    if made.rng.random() < 0.5:
        made.metric("reference_moved", lambda i, _: 0.15 * math.sqrt(i + 1))
    else:
        made.metric("kl", lambda i, _: 0.0)


FAULTS: dict[str, Callable[[Made], None]] = {
    "constant_scorer": _constant_scorer,
    "no_signal": _no_signal,
    "advantage_sign": _advantage_sign,
    "no_gradient": _no_gradient,
    "odd_scores": _odd_scores,
    "failing_scorer": _failing_scorer,
    "saturated_scores": _saturated_scores,
    "scorer_drift": _scorer_drift,
    "stale_reward_model": _stale_reward_model,
    "entropy_collapse": _entropy_collapse,
    "uniform_noise": _uniform_noise,
    "watched_falls": _watched_falls,
    "kl_budget": _kl_budget,
    "length_drift": _length_drift,
    "truncation": _truncation,
    "empty_completions": _empty,
    "duplicates": _duplicates,
    "repetitive_texts": _repetitive,
    "odd_prompts": _odd_prompts,
    "ratio_one": _ratio_one,
    "mostly_clipped": _mostly_clipped,
    "one_sided_clipping": _one_sided,
    "effective_sample_size": _ess,
    "sampler_gap": _sampler_gap,
    "gradient_spike": _gradient_spike,
    "non_finite": _non_finite,
    "step_too_large": _too_large,
    "step_too_small": _too_small,
    "weights_unmoved": _unmoved,
    "reference_moved": _reference,
}


def found(name: str, seeds: Sequence[int]) -> list[Finding | None]:
    """What a detector says of its own fault, a run for each seed."""
    said = []
    for seed in seeds:
        made = healthy(seed)
        FAULTS[name](made)
        result = DETECTORS[name](made.evidence())
        said.append(result if isinstance(result, Finding) else None)
    return said


def false_alarms(evidences: Sequence[Evidence]) -> dict[str, list[Finding]]:
    """What each detector says of healthy runs: nothing, where it is right."""
    said: dict[str, list[Finding]] = {name: [] for name in DETECTORS}
    for evidence in evidences:
        for name, detector in DETECTORS.items():
            result = detector(evidence)
            if isinstance(result, Finding):
                said[name].append(result)
    return said

"""Held-out performance: the same prompts and seeds before and after, with intervals."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lossmith.policy import Policy, sample
from lossmith.prompts import PromptSet
from lossmith.rewards import Scorer, score_rollouts
from lossmith.rollouts import Rollout
from lossmith.training.recipe import Recipe

__all__ = ["Evaluation", "Interval", "comparison", "evaluate", "interval", "paired", "preferred"]

EVALUATION_STEP = -1  # its random numbers are those of no training step, and the same before and after


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% confidence interval (Student's t over `n` prompts)."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which has no NaN: None where there are too few prompts to say."""
        figures = {"mean": self.mean, "ci95_low": self.low, "ci95_high": self.high, "n": self.n}
        return {name: None if math.isnan(x) else x for name, x in figures.items()}


@dataclass(frozen=True)
class Evaluation:
    """Completions of the held-out prompts; each prompt's score is the unit of the statistics."""

    rollouts: list[Rollout]

    @property
    def scores(self) -> dict[str, float]:
        """{prompt id: score}; prompts whose completion has no score are left out."""
        return {r.prompt.id: float(r.score.value) for r in self.rollouts if r.score and r.score.value is not None}

    @property
    def reward(self) -> Interval:
        return interval(list(self.scores.values()))

    @property
    def mean_length(self) -> float:
        return statistics.fmean(len(r.completion_ids) for r in self.rollouts)

    @property
    def ended(self) -> float:
        """Share of completions that ended by themselves, within the token budget."""
        return statistics.fmean(not r.truncated for r in self.rollouts)


def evaluate(policy: Policy, prompts: PromptSet, scorer: Scorer, recipe: Recipe) -> Evaluation:
    """One completion of each prompt, scored. Random numbers depend on the recipe's seed and the prompt alone."""
    rollouts = sample(policy, list(prompts), 1, recipe.sampling, seed=recipe.seed, step=EVALUATION_STEP)
    return Evaluation(score_rollouts(scorer, rollouts, on_error=recipe.scorer_errors, timeout=recipe.scorer_timeout))


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values and its 95% confidence interval; one value or none has no width to give."""
    n = len(values)
    mean = statistics.fmean(values) if n else math.nan
    half = student_t(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Interval(mean, mean - half, mean + half, n)


def paired(before: Evaluation, after: Evaluation) -> Interval:
    """The interval of the difference after - before, prompt by prompt."""
    first, second = before.scores, after.scores
    return interval([second[key] - first[key] for key in first if key in second])


def preferred(before: Evaluation, after: Evaluation) -> Interval:
    """How often the completion after is scored higher than the one before, prompt by prompt; a tie counts half."""
    first, second = before.scores, after.scores
    found = interval([(second[k] > first[k]) + 0.5 * (second[k] == first[k]) for k in first if k in second])
    return dataclasses.replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))  # a share; NaN stays


def comparison(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Before, after, the paired difference, and how often after is preferred, as summary.json holds them."""

    def of(evaluation: Evaluation) -> dict[str, Any]:
        return evaluation.reward.as_dict() | {"ended": evaluation.ended, "mean_length": evaluation.mean_length}

    return {
        "before": of(before),
        "after": of(after),
        "difference": paired(before, after).as_dict(),
        "preferred": preferred(before, after).as_dict(),
    }


_SMALL_T = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}


def student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t: a table to 4 degrees of freedom, then an expansion within 0.2%."""
    if freedom in _SMALL_T:
        return _SMALL_T[freedom]
    z = 1.959963984540054
    n = float(freedom)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )

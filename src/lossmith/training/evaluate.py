"""Held-out performance: the same prompts and seeds before and after, with intervals and what they bear."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lossmith.detectors.signal import without_signal
from lossmith.intervals import ALIKE, Interval, alike, allows_verdict, in_words, mean_of, share_of, verdict
from lossmith.rollouts import Rollout

__all__ = [
    "EVALUATION_STEP",
    "Evaluation",
    "comparison",
    "during",
    "paired",
    "preferred",
    "rescored",
    "sentences",
    "tally",
]

EVALUATION_STEP = -1  # its random numbers are those of no training step, and the same before and after


@dataclass(frozen=True)
class Evaluation:
    """Completions of the held-out prompts; each prompt's score is the unit of the statistics."""

    rollouts: list[Rollout]

    @property
    def scores(self) -> dict[str, float]:
        """{prompt id: score}; prompts whose completion has no score are left out."""
        return {r.prompt.id: float(r.score.value) for r in self.rollouts if r.score and r.score.value is not None}

    @property
    def mean(self) -> float:
        """The mean score; NaN where no completion has one."""
        scores = self.scores
        return statistics.fmean(scores.values()) if scores else math.nan

    @property
    def mean_length(self) -> float:
        return statistics.fmean(len(r.completion_ids) for r in self.rollouts)

    @property
    def ended(self) -> float:
        """Share of completions that ended by themselves, within the token budget."""
        return statistics.fmean(not r.truncated for r in self.rollouts)

    @property
    def distinct(self) -> int:
        """Different texts among the completions."""
        return len({r.completion for r in self.rollouts})


# -- figures ----------------------------------------------------------------------------------------------------------


def paired(before: Evaluation, after: Evaluation) -> Interval:
    """The interval of the difference after - before, prompt by prompt."""
    first, second = before.scores, after.scores
    span = max(_seen(before, after)) - min(_seen(before, after)) if first or second else 0.0
    return mean_of([second[key] - first[key] for key in first if key in second], within=(-span, span))


def preferred(before: Evaluation, after: Evaluation) -> Interval:
    """How often the completion after is scored higher than the one before, prompt by prompt; a tie counts half."""
    first, second = before.scores, after.scores
    return share_of([(second[k] > first[k]) + 0.5 * (second[k] == first[k]) for k in first if k in second])


def comparison(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Before, after, the paired difference, and how often after is preferred, as summary.json holds them."""
    seen = _seen(before, after)

    def of(evaluation: Evaluation) -> dict[str, Any]:
        values = list(evaluation.scores.values())
        found = (
            share_of(values) if set(seen) == {0.0, 1.0} else mean_of(values, (min(seen), max(seen)) if seen else None)
        )
        return found.as_dict() | {
            "prompts": len(evaluation.rollouts),
            "ended": evaluation.ended,
            "mean_length": evaluation.mean_length,
            "distinct_texts": evaluation.distinct,
        }

    return {
        "before": of(before),
        "after": of(after),
        "difference": paired(before, after).as_dict(),
        "preferred": preferred(before, after).as_dict(),
    }


def during(before: Evaluation, now: Evaluation) -> dict[str, float]:
    """What a step's line says of the held-out prompts, before the step's update; an interval where there is one."""
    change = paired(before, now)
    figures = {
        "held_out": now.mean,
        "held_out_n": change.n,
        "held_out_change": change.mean,
        "held_out_change_low": change.low,
        "held_out_change_high": change.high,
    }
    return {name: x for name, x in figures.items() if math.isfinite(x)}


def rescored(before: Evaluation, again: Evaluation, claimed: float) -> dict[str, Any]:
    """What the scorer says at the end of the texts that it scored at the start, as summary.json holds it.

    claimed: the change that the run reports. changed: how many scores are others, beyond rounding.
    """
    first, second = before.scores, again.scores
    both = [key for key in first if key in second]
    size = 1e-6 * max([abs(first[key]) for key in both] + [0.0])
    moved = [second[key] - first[key] for key in both]
    values = [first[key] for key in both]
    return {
        "n": len(both),
        "changed": sum(abs(x) > size for x in moved),
        "change": mean_of(moved).as_dict(),
        "mean_absolute": statistics.fmean(map(abs, moved)) if moved else 0.0,
        "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
        "claimed": claimed if math.isfinite(claimed) else None,
    }


def _seen(*evaluations: Evaluation) -> list[float]:
    """All scores there were: what is known of those there may be."""
    return [value for evaluation in evaluations for value in evaluation.scores.values()]


def tally(
    records: Sequence[Mapping[str, Any]], completions: int, before: Evaluation, after: Evaluation
) -> dict[str, Any]:
    """What the steps of a run say together, as summary.json holds it. `completions`: of one step, scored or not.

    one_score: that of every completion, held-out ones included, where there was but one.
    """
    seen = [*_seen(before, after), *(r["reward"] for r in records)]
    one = alike(seen) and all(r["reward_std"] <= ALIKE * abs(r["reward"]) for r in records)
    return {
        "completions": completions * len(records),
        "dropped": sum(r["dropped"] for r in records),
        "steps": len(records),
        "steps_without_signal": sum(map(without_signal, records)),
        "one_score": seen[0] if one else None,
    }


# -- in words ---------------------------------------------------------------------------------------------------------


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What a run's summary says of the policy, and what must be known beside it."""
    held_out, steps = summary["held_out"], summary.get("training", {})
    silent = _no_verdict(held_out, steps) or _void(summary.get("findings", ()))
    said = [silent or verdict(held_out["difference"], "held-out score")]
    if not silent and allows_verdict(held_out["difference"]):
        share = held_out["preferred"]
        said.append(
            f"Preferred to the untrained policy on {share['mean']:.0%} of the {share['n']} prompts "
            f"({in_words(share)}; ties count half)."
        )
    return said + _beside(held_out, steps) + _best(summary)


def _no_verdict(held_out: Mapping[str, Any], steps: Mapping[str, Any]) -> str:
    """Why before and after say nothing of what was learned, however they differ."""
    count, before, after = steps.get("steps", 0), held_out["before"], held_out["after"]
    if steps.get("one_score") is not None:
        return (
            f"No verdict: the scorer gave every completion the same score ({steps['one_score']:g}), so nothing was "
            "learned from it. More steps or prompts would not change that; a scorer that tells completions apart would."
        )
    if count and steps["steps_without_signal"] == count:
        return (
            f"No verdict: in none of the {count} steps did the scores of a prompt's completions differ, so nothing was "
            "learned from them. Look at the completions in rollouts/, and at the scorer."
        )
    if after.get("distinct_texts") == 1 and after["prompts"] > 1:
        was = "as before training" if before["distinct_texts"] == 1 else "where it wrote several before training"
        return (
            f"No verdict: the policy answers all {after['prompts']} held-out prompts with one and the same text, {was}"
            ". Its score is what that text earns. A lower learning rate or a stronger KL term may hold it."
        )
    return ""


def _void(findings: Sequence[Mapping[str, Any]]) -> str:
    """A finding with which the scores before and after say nothing of what was wanted."""
    found = next((f for f in findings if f["voids"]), None)
    return "" if found is None else f"No verdict: {found['sentence']}. Likely: {found['cause']}. Try: {found['cure']}."


def _best(summary: Mapping[str, Any]) -> list[str]:
    best = summary.get("best")
    if best is None:
        return []
    return [
        f"The policy after {best['after_steps']} step{'s' * (best['after_steps'] != 1)} is kept in policy-best/: its "
        f"held-out score, {best['mean']:.3f} (n = {best['n']}), was the best of {best['of']} looks. Chosen for that "
        "score, it is likely to do worse on other prompts."
    ]


def _beside(held_out: Mapping[str, Any], steps: Mapping[str, Any]) -> list[str]:
    before, after, n = held_out["before"], held_out["after"], held_out["difference"]["n"]
    said = []
    if 1 < after.get("distinct_texts", 0) < 0.5 * before.get("distinct_texts", 0):
        said.append(
            f"The held-out completions are {after['distinct_texts']} different texts, and were "
            f"{before['distinct_texts']} before training: look at what it repeats."
        )
    if steps.get("dropped"):
        said.append(
            f"{steps['dropped']} of {steps['completions']} completions ({steps['dropped'] / steps['completions']:.0%}) "
            "had no score and were dropped: nothing was learned from them."
        )
    if n < after.get("prompts", n):
        said.append(
            f"{n} of {after['prompts']} held-out prompts have a score both before and after: the interval is from "
            f"{n} prompt{'s' * (n != 1)}, those that the scorer could judge."
        )
    if 0 < steps.get("steps_without_signal", 0) < steps.get("steps", 0):
        said.append(
            f"In {steps['steps_without_signal']} of {steps['steps']} steps the scores of each prompt's completions "
            "were all equal: nothing was learned in these."
        )
    return said

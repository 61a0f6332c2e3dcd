"""The best of n: one completion of each prompt, by its score (book eq. 4.86, with argmax for its max)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lossmith.rollouts import Rollout
from lossmith.scorers.scorer import OnError, Scorer, score_rollouts

__all__ = ["BestOf", "best_of", "choose_best"]


@dataclass(frozen=True)
class BestOf:
    """`rollouts`: the best of each prompt, scored, in the prompts' order. The rest is counted.

    abstained, failed  completions without a score, which are never chosen
    without            prompts that have no completion with a score, and so no best one
    tied               prompts whose best score several completions share; the first was taken
    """

    rollouts: list[Rollout]
    abstained: int = 0
    failed: int = 0
    without: int = 0
    tied: int = 0


def best_of(
    scorer: Scorer, rollouts: Sequence[Rollout], *, on_error: OnError = "drop", timeout: float | None = 60.0
) -> BestOf:
    """Score, and keep the best completion of each prompt. `timeout` is in seconds for all of them."""
    return choose_best(score_rollouts(scorer, rollouts, on_error=on_error, timeout=timeout))


def choose_best(scored: Sequence[Rollout]) -> BestOf:
    """The argmax of each prompt's scores; ties go to the first."""
    prompts: dict[str, list[Rollout]] = {}
    for r in scored:
        prompts.setdefault(r.prompt.id, []).append(r)
    best: list[Rollout] = []
    no_score = tied = 0
    for group in prompts.values():
        values = [(r.score.value, r) for r in group if r.score is not None and r.score.value is not None]
        if not values:
            no_score += 1
            continue
        top = max(value for value, _ in values)
        winners = [r for value, r in values if value == top]
        tied += len(winners) > 1
        best.append(winners[0])
    abstained = sum(r.score is not None and r.score.abstained for r in scored)
    failed = sum(r.score is None or r.score.error is not None for r in scored)
    return BestOf(best, abstained, failed, no_score, tied)

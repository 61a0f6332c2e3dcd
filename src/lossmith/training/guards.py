"""Guards against over-optimisation: a second scorer that nothing trains on, and a budget of KL.

A reward is a proxy. Pushed far enough, it goes on rising while what it stands for falls (Goodhart); the distance that
the policy has moved is measured as KL(π_θ || π_ref), and the fall shows against its square root (arXiv:2210.10760).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lossmith.losses import Loss
from lossmith.rollouts import Rollout
from lossmith.training.metrics import in_completions
from lossmith.training.recipe import Recipe

__all__ = ["Guard", "kl_of_completion", "prompt_means"]


@dataclass
class Guard:
    """Reads each step's record in metrics.jsonl, and says when a run should stop."""

    watch_window: int = 0  # steps over which the watched score is averaged; 0 never stops
    kl_budget: float | None = None  # nats a completion
    cut: str = ""  # what the loss does with completions that the token budget cut, and that nothing can be learned from
    seen: list[tuple[float, float]] = field(default_factory=list)  # (mean, its variance) of the watched score, by step

    @classmethod
    def of(cls, recipe: Recipe, loss: Loss) -> Guard:
        cut = {"mask": "leaves those out", "zero": "gives those reward 0"}.get(loss.of_truncated, "")
        return cls(recipe.watch_window, recipe.kl_budget, f"{loss.name} {cut}" if cut else "")

    def reason_to_stop(self, record: Mapping[str, Any]) -> str:
        """Why the run should end after this step, or ""."""
        if self.cut and record.get("ended") == 0:
            return (
                "no signal: every completion was cut at max_tokens before it ended, and the loss "
                f"{self.cut} (truncated); raise max_tokens"
            )
        if "watch" in record:
            self.seen.append((record["watch"], record["watch_variance"]))
        kl = kl_of_completion(record)
        if self.kl_budget is not None and kl is not None and kl > self.kl_budget:
            return f"KL budget spent: the policy is {kl:.2f} nats a completion from the reference ({self.kl_budget:g})"
        return self._fall()

    def _fall(self) -> str:
        """The last window of the watched score against the best one before it: a fall of over two standard errors."""
        w = self.watch_window
        if not w or len(self.seen) < 2 * w:
            return ""
        windows = [_mean(self.seen[i : i + w]) for i in range(len(self.seen) - 2 * w + 1)]
        (best, best_variance), (now, variance) = max(windows), _mean(self.seen[-w:])
        if best - now <= 2 * math.sqrt(best_variance + variance):
            return ""
        return (
            f"over-optimised: the watched score fell from {best:.3f} to {now:.3f} while the reward was trained on "
            f"(means over {w} steps; more than two standard errors)"
        )


def _mean(steps: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(mean, its variance) over steps whose prompts differ."""
    return statistics.fmean(m for m, _ in steps), sum(v for _, v in steps) / len(steps) ** 2


def kl_of_completion(record: Mapping[str, Any]) -> float | None:
    """KL(π_θ || π_ref) of a step's record, nats a completion; None where it was not measured."""
    return in_completions(record).get("kl")


def prompt_means(rollouts: Sequence[Rollout]) -> list[float]:
    """The mean score of each prompt's completions; prompts without a score are left out."""
    groups: dict[str, list[float]] = {}
    for r in rollouts:
        if r.score is not None and r.score.value is not None:
            groups.setdefault(r.prompt.id, []).append(r.score.value)
    return [statistics.fmean(values) for values in groups.values()]

"""The scorer of a recipe as verl's custom reward function: one completion at a time, in verl's own processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lossmith.errors import ScorerError
from lossmith.prompts import Prompt
from lossmith.rollouts import Distribution, LogProbs, Rollout
from lossmith.scorers import Scorer, ScorerSettings, load_scorer, score_rollouts
from lossmith.training import Recipe

__all__ = ["scorer_of"]


def scorer_of(recipe: Path) -> Callable[..., float]:
    """`compute_score` for verl's reward.custom_reward_function. The scorer is loaded when it is first asked.

    ScorerError: the scorer failed, or has no opinion, which verl has no place for.
    """
    lock, loaded = threading.Lock(), list[tuple[Recipe, Scorer]]()

    def compute_score(
        data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any
    ) -> float:
        content, columns = json.loads((extra_info or {})["prompt"])
        nothing = LogProbs(torch.zeros(0), Distribution(0))
        rollout = Rollout(Prompt(content, columns), 0, (), (), solution_str, nothing, "stop")
        with lock:  # verl asks from several threads
            if not loaded:
                settings = Recipe.make(str(recipe), **Recipe.read(recipe))
                limits = ScorerSettings(parallel=settings.scorer_parallel, per_minute=settings.scorer_per_minute)
                loaded.append((settings, load_scorer(settings.scorer, settings=limits)))
            settings, scorer = loaded[0]
            score = score_rollouts(scorer, [rollout], timeout=settings.scorer_timeout)[0].score
        if score is None or score.value is None:
            raise ScorerError(
                f"{scorer.name} has no opinion on a completion, and verl needs a reward for each. Give a number, or "
                "train with `lossmith train`."
            )
        return float(score.value)

    return compute_score

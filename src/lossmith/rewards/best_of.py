"""Best of n: of each prompt's completions, the one that the scorer likes most."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lossmith.rollouts import Rollout

__all__ = ["best_of"]


def best_of(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """argmax of the score for each prompt (4.86), in the prompts' order; of equals the first.

    Rollouts without a score cannot be the best; a prompt whose rollouts all lack one is left out.
    """
    best: dict[str, Rollout] = {}
    highest: dict[str, float] = {}
    for rollout in rollouts:
        value = rollout.score.value if rollout.score else None
        if value is not None and value > highest.get(rollout.prompt.id, -math.inf):
            best[rollout.prompt.id], highest[rollout.prompt.id] = rollout, value
    return list(best.values())

"""Completions under prompts that they are no answer to: KTO's reference point is measured on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lossmith.rollouts import Rollout

__all__ = ["swapped_completions"]


def swapped_completions(rollouts: Sequence[Rollout], context_length: int) -> tuple[list[int], list[Rollout]]:
    """(numbers of rows, for each of them another prompt's completion as an answer to its prompt).

    Which one does not depend on the order of the rollouts. A row is left out where none fits the context.
    """
    rows, swapped = [], []
    order = sorted(range(len(rollouts)), key=lambda i: (rollouts[i].prompt.id, rollouts[i].completion_ids))
    for at, i in enumerate(order):
        mine = rollouts[i]
        room = context_length - len(mine.prompt_ids)
        for other in (rollouts[j] for j in (*order[at + 1 :], *order[:at])):
            if other.prompt.id != mine.prompt.id and len(other.completion_ids) <= room:
                rows.append(i)
                swapped.append(dataclasses.replace(other, prompt=mine.prompt, prompt_ids=mine.prompt_ids))
                break
    return rows, swapped

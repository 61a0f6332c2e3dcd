"""The scores of a round as the tensor that a loss reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lossmith.errors import RunError
from lossmith.rollouts import Rollout, pad_rows

__all__ = ["rewards_of"]


def rewards_of(rollouts: Sequence[Rollout], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rewards in this type; in float64, as they come, where the narrower one would lose their size or order.

    [N], or [N, T] where any scorer gave rewards by token. RunError: the device has no float64, and they need it.
    """
    rewards = _as_scored(rollouts)
    narrow = rewards.to(dtype)
    if bool(narrow.isfinite().all()) and len(narrow.unique()) == len(rewards.unique()):
        return narrow.to(device)
    if device.type == "mps":
        raise RunError(
            f"rewards up to {float(rewards.abs().max()):.3g} need float64 to keep their size and order, which {device} "
            "does not have: let the scorer give smaller numbers, or train on the CPU (device = 'cpu')."
        )
    return rewards.to(device)


def _as_scored(rollouts: Sequence[Rollout]) -> Tensor:
    """[N], or [N, T] where any scorer gave rewards by token; a score of the whole then stands at the last token."""
    scores = [r.score for r in rollouts if r.score is not None]
    if all(score.per_token is None for score in scores):
        return torch.tensor([score.value for score in scores], dtype=torch.float64)
    rows = [
        torch.tensor(s.per_token or [*[0.0] * (len(r.completion_ids) - 1), float(s.value or 0)], dtype=torch.float64)
        for r, s in zip(rollouts, scores, strict=True)
    ]
    return pad_rows(rows)[0]

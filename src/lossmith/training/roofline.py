"""The floor: the least time that a round's matrix products can take on this machine.

Counted are the products with weights: 2 operations a weight and token forward, 4 backward. Attention over the context
is left out, and so is all that moves memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lossmith.policy import Policy
from lossmith.rollouts import Rollout

__all__ = ["Work", "count_work", "multiply_rate"]


@dataclass(frozen=True)
class Work:
    """Operations of a round, by phase."""

    sample: float
    forward: float
    backward: float

    @property
    def update(self) -> float:
        return self.forward + self.backward


def count_work(policy: Policy, rollouts: Sequence[Rollout]) -> Work:
    """What these completions cost: a prompt counts once, whatever the number of its completions."""
    head = policy.model.get_output_embeddings().weight.numel()
    matrices = [p for p in policy.model.base_model.parameters() if p.dim() == 2]
    body = sum(p.numel() for p in matrices) - _embeddings(policy)
    # of weights that are not trained there is no gradient, only one through them
    learning = body if policy.adapter is None else sum(p.numel() for p in matrices if p.requires_grad)
    learning_head = head if policy.adapter is None else 0
    responses = sum(len(r.completion_ids) for r in rollouts)
    prompts = sum(len(ids) for ids in {r.prompt_ids for r in rollouts})
    fed = responses - len(rollouts)  # the last token of a completion is fed to nothing
    return Work(
        sample=2.0 * (body * (prompts + fed) + head * responses),
        forward=2.0 * (body * (prompts + fed) + head * responses),
        backward=2.0 * ((body + learning) * (prompts + fed) + (head + learning_head) * responses),
    )


def _embeddings(policy: Policy) -> int:
    """Numbers that are looked up, not multiplied: token and learned position embeddings."""
    tables = [m for m in policy.model.base_model.modules() if isinstance(m, torch.nn.Embedding)]
    return sum(table.weight.numel() for table in tables)


def multiply_rate(policy: Policy, rows: int = 1024) -> float:
    """Operations a second of a product as the policy's layers make it, in the type that it computes in."""
    hidden = policy.model.get_output_embeddings().weight.shape[1]
    dtype, device = policy.compute_dtype, policy.device
    x = torch.randn(rows, hidden, device=device).to(dtype)
    w = torch.randn(4 * hidden, hidden, device=device).to(dtype)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(3):
            torch.nn.functional.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - start) / 3)
    return 2.0 * rows * hidden * 4 * hidden / statistics.median(seconds)

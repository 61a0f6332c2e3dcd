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
from lossmith.policy.quantized import numbers
from lossmith.rollouts import Rollout

__all__ = ["Work", "count_work", "multiply_rate", "work_of"]


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
    responses = sum(len(r.completion_ids) for r in rollouts)
    prompts = sum(len(ids) for ids in {r.prompt_ids for r in rollouts})
    return work_of(policy, prompts, responses - len(rollouts), responses)  # the last token of each is fed to nothing


def work_of(policy: Policy, prompts: int, fed: int, responses: int) -> Work:
    """Of so many tokens of prompts, of completions that are fed, and that are predicted."""
    body_matrices = [p for p in policy.model.base_model.parameters() if p.dim() == 2]
    head = policy.model.get_output_embeddings().weight
    trained = {id(p) for p in policy.parameters()}  # of other weights there is no gradient, only one through them
    looked_up = _embeddings(policy)
    body = numbers(body_matrices) - looked_up
    learning = numbers(p for p in body_matrices if id(p) in trained)
    learning -= looked_up if policy.adapter is None else 0
    head_learns = id(head) in trained
    through = body * (prompts + fed) + head.numel() * responses
    return Work(
        sample=2.0 * through,
        forward=2.0 * through,
        backward=2.0 * (through + learning * (prompts + fed) + head_learns * head.numel() * responses),
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

"""The optimizer of whatever is trained: AdamW, gradients no longer than a bound, the learning rate over the steps."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lossmith.errors import RecipeError
from lossmith.settings.base import TrainerSettings

__all__ = ["check_kahan", "check_optimizer", "clip_gradients", "make_optimizer", "optimizer_step", "rate_factor"]


# In bfloat16 an average over 1000 squared gradients stands still: what one update changes of it is less than its last
# bit. Over 100 it moves.
_KAHAN_BETAS = (0.9, 0.99)


def make_optimizer(
    groups: Sequence[tuple[Sequence[nn.Parameter], float]], settings: TrainerSettings
) -> torch.optim.Optimizer:
    """AdamW over groups of (parameters, their learning rate once it has risen).

    Where some are held in bfloat16 it is optimi's, which carries along what is rounded away (Kahan summation): a step
    of 1e-6 would else change no weight above 0.0005.
    """
    made = [{"params": list(parameters), "base_lr": rate} for parameters, rate in groups]
    if not any(p.dtype == torch.bfloat16 for parameters, _ in groups for p in parameters):
        return torch.optim.AdamW(made, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    from optimi import AdamW

    rate, decay = settings.learning_rate, settings.weight_decay
    found: torch.optim.Optimizer = AdamW(made, lr=rate, weight_decay=decay, betas=_KAHAN_BETAS, eps=1e-8)
    return found


def check_kahan() -> None:
    """RecipeError: what weights in bfloat16 are trained with is not installed."""
    if importlib.util.find_spec("optimi") is None:
        raise RecipeError(
            "weights = 'bfloat16' needs torch-optimi, whose AdamW carries along what bfloat16 rounds away: "
            "pip install lossmith[bfloat16], or leave weights at 'float32'."
        )


def clip_gradients(optimizer: torch.optim.Optimizer, settings: TrainerSettings) -> float:
    """Scale gradients down to max_grad_norm; returns their length before, not finite where they are not.

    Of parameters that ranks hold in parts it is the length of all: every rank must call this.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in parameters if p.grad is not None]
    if any(g.dtype == torch.bfloat16 for g in grads):  # torch would round the length to it
        length = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]).norm()
        torch.nn.utils.clip_grads_with_norm_(parameters, settings.max_grad_norm, length)
        return float(length)
    norm: Any = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def optimizer_step(optimizer: torch.optim.Optimizer, settings: TrainerSettings, step: int, steps: int) -> None:
    """Move the parameters, at the learning rate of this step of so many, 0-based."""
    factor = rate_factor(settings, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    optimizer.step()


def rate_factor(settings: TrainerSettings, step: int, steps: int) -> float:
    """What the learning rate is multiplied with at this step, 0-based: warm-up, then the schedule."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[settings.schedule]


def check_optimizer(source: str, settings: TrainerSettings) -> None:
    """RecipeError: no weight would move, or none would be left.

    AdamW moves a weight by about learning_rate in one update, whatever the size of its gradient, as long as that is
    above the 1e-8 which AdamW adds to it; and it takes learning_rate times weight_decay of the weight away.
    """
    rate, decay, norm = settings.learning_rate, settings.weight_decay, settings.max_grad_norm
    if rate < 1e-12:
        raise RecipeError(
            f"{source}: learning_rate = {rate:g} changes nothing: weights are rounded more coarsely than that. "
            "Usual is 1e-6 to 1e-4."
        )
    if rate > 1:
        raise RecipeError(
            f"{source}: learning_rate = {rate:g} moves every weight by about {rate:g} in one update, and the weights "
            "of a model are below 1: nothing of it would be left. Usual is 1e-6 to 1e-4."
        )
    if rate * decay >= 1:
        raise RecipeError(
            f"{source}: weight_decay = {decay:g} with learning_rate = {rate:g} takes the whole of every weight away in "
            "one update. Usual is 0 to 0.1."
        )
    if norm <= 1e-8:
        raise RecipeError(
            f"{source}: max_grad_norm = {norm:g} scales gradients down to where AdamW takes them for 0: nothing moves. "
            "Usual is 1."
        )

"""Activation checkpointing: a layer keeps its input alone, and is run again in the backward pass.

A third more computing for a tenth of the memory. Results are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from lossmith.policy.attention import attending, current_plan

__all__ = ["can_checkpoint_activations", "checkpoint_activations", "model_layers"]


def can_checkpoint_activations(model: Any) -> bool:
    """Whether the model's layers are of transformers' kind that can be run again."""
    return bool(model_layers(model))


@contextlib.contextmanager
def checkpoint_activations(model: Any) -> Iterator[None]:
    """Forward passes within keep the inputs of layers only; their backward pass may come after it."""
    layers = model_layers(model)
    for layer in layers:
        layer.forward = partial(_forward, model, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # what the class says is visible again


def model_layers(model: Any) -> list[Any]:
    """The repeated blocks of a transformers model; none where it has no such blocks."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _forward(model: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return inner(*args, **kwargs)
    plan = current_plan()  # the second time, in the backward pass, it is no longer current

    def run_layer(*layer_args: Any, **layer_kwargs: Any) -> Any:
        if plan is None:
            return inner(*layer_args, **layer_kwargs)
        with attending(model, plan):
            return inner(*layer_args, **layer_kwargs)

    return checkpoint(run_layer, *args, use_reentrant=False, **kwargs)

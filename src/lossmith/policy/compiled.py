"""The update's layers through torch.compile: the small operations between matrix products become a few kernels.

Their linear layers multiply by weights that are rounded to bfloat16 once an update. Under autocast alone, a compiled
layer would round its weights in every forward and backward pass.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from lossmith.errors import PolicyError
from lossmith.policy.activation_checkpointing import model_layers
from lossmith.policy.load import Policy

__all__ = ["bfloat16_weights", "check_compiler", "compile_layers", "compiler_found", "leave_uncompiled", "uncompiled"]


def compiler_found() -> bool:
    """Whether there is a C++ compiler, which torch.compile calls."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name)


def check_compiler() -> None:
    """PolicyError: torch.compile writes C++ on a CPU, and no C++ compiler is installed."""
    if not compiler_found():
        raise PolicyError(
            "compile = true needs a C++ compiler, and neither g++ nor clang++ is on the PATH: install one (on Debian "
            "or Ubuntu, the package g++), or leave compile = false."
        )


def compile_layers(policy: Policy) -> None:
    """Let the model's layers be compiled when they are first run. All layers share what is made for the first."""
    for layer in model_layers(policy.model):
        layer.compile(dynamic=True)


def leave_uncompiled(policy: Policy) -> None:
    """Run the model's layers as they were written again."""
    for layer in model_layers(policy.model):
        layer._compiled_call_impl = None  # what nn.Module.compile has set


def uncompiled() -> contextlib.AbstractContextManager[None]:
    """Within, compiled layers run as they were written: decoding has faster ways of its own."""
    return cast("contextlib.AbstractContextManager[None]", torch.compiler.set_stance("force_eager"))


@contextlib.contextmanager
def bfloat16_weights(policy: Policy) -> Iterator[None]:
    """Within, the layers' linear weights are copies in the compute type; their gradients are added to the weights' own.

    Forward and backward pass both belong inside.
    """
    layers = model_layers(policy.model) if policy.compute_dtype == torch.bfloat16 else []
    linear = [m for layer in layers for m in layer.modules() if type(m) is nn.Linear]
    own = [m.weight for m in linear]
    for module in linear:
        module.weight = _bfloat16_copy(cast(nn.Parameter, module.weight))
    try:
        yield
    finally:
        for module, weight in zip(linear, own, strict=True):
            module.weight = weight


def _bfloat16_copy(weight: nn.Parameter) -> nn.Parameter:
    """A copy whose gradient is added to that of `weight`, in its type, as soon as it is complete."""
    copy = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=weight.requires_grad)

    def move_gradient(leaf: Tensor) -> None:
        assert leaf.grad is not None
        if weight.grad is None:
            weight.grad = leaf.grad.to(weight.dtype)
        else:
            weight.grad.add_(leaf.grad)
        leaf.grad = None

    if copy.requires_grad:
        copy.register_post_accumulate_grad_hook(move_gradient)
    return copy

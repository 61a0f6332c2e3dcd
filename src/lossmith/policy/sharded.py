"""A policy of which every rank holds a part (FSDP2): a layer is gathered when it is computed, and let go afterwards.

FSDP2 gathers before a module's forward and lets go after it. Layers are called as modules, so theirs is all there is to
do; the root's weights are not: the head multiplies by its weight directly, outside of any module's forward. What needs
them therefore runs in `gathered`, which FSDP2 is told is a forward of the root.

Every rank must make the same number of passes: each is a collective, and one that a rank left out would be waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lossmith.errors import PolicyError
from lossmith.policy.activation_checkpointing import model_layers
from lossmith.policy.load import Policy
from lossmith.policy.trial import sharing_is_exact

__all__ = ["first_row", "gathered", "indivisible", "shard", "whole", "whole_tensor"]

T = TypeVar("T")
_RUN = "lossmith_run"  # the name of `_run` in a model whose weights are held in parts


def shard(policy: Policy) -> None:
    """From now on this rank holds its part of every weight; gradients are summed over the ranks, never averaged.

    The loss carries 1/Z of the whole update already. Matrix products run in the compute type as before: weights are
    gathered as they are, in float32. Gradients are dealt out after every backward pass: kept until the last one, they
    would take as much memory as the whole model. Every rank must call this.
    PolicyError: its layers are not known, or only a part of its weights is trained.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    sharing_is_exact(policy)  # its trial calls the model in ways of its own
    if why := indivisible(policy):
        raise PolicyError(why)
    layers = model_layers(policy.model)
    if policy.device.type == "cuda":
        torch.cuda.set_device(policy.device)
    mesh = init_device_mesh(policy.device.type, (dist.get_world_size(),))
    for module in (*layers, policy.model, *filter(None, [policy.value_head])):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    setattr(policy.model, _RUN, _run)
    register_fsdp_forward_method(policy.model, _RUN)
    for part in _parts(policy):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    with torch.no_grad():
        gathered(policy.model, list)  # the first pass tells FSDP2 which module is the root, and a layer is not


def indivisible(policy: Policy) -> str:
    """Why ranks cannot hold it in parts; "" where they can."""
    name = type(policy.model).__name__
    if not model_layers(policy.model):
        return (
            f"shard = true: {name} is not made of layers as transformers has them, which could be gathered one at a "
            "time. Train it with shard = false, where every rank holds all of it."
        )
    if len({p.requires_grad for p in policy.model.parameters()}) > 1:
        return (
            f"shard = true deals out a model of which all weights are trained, and of {name} only some are (an "
            "adapter?). Train it with shard = false: what is trained is small."
        )
    return ""


def gathered(model: Any, work: Callable[[], T]) -> T:
    """work(), which may read the weights of the model's root; it returns tensors, alone or in lists."""
    result: T = getattr(model, _RUN, _run)(work)
    return result


def _run(work: Callable[[], T]) -> T:
    return work()


@contextlib.contextmanager
def whole(policy: Policy) -> Iterator[None]:
    """Every rank has all weights within, and may make as many passes as it likes, without gradient: to sample, say.

    Of a policy that is not sharded, nothing is done.
    """
    parts = _parts(policy) if hasattr(policy.model, _RUN) else []
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def _parts(policy: Policy) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    roots: list[nn.Module] = [policy.model, *filter(None, [policy.value_head])]
    return [module for root in roots for module in root.modules() if isinstance(module, FSDPModule)]


# -- one tensor --------------------------------------------------------------------------------------------------------


def whole_tensor(x: Tensor) -> Tensor:
    """All of a tensor that ranks hold in parts, without gradient; every rank must call this. Others as they are."""
    gather = getattr(x.detach(), "full_tensor", None)
    return x.detach() if gather is None else gather()


def first_row(x: Any) -> int:
    """Where this rank's rows of a tensor in parts begin: parts are of one size, but for the last that has any."""
    size = -(-x.shape[0] // x.device_mesh.size())
    return int(min(x.device_mesh.get_local_rank() * size, x.shape[0]))

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

from torch import nn

from lossmith.policy.activation_checkpointing import model_layers
from lossmith.policy.load import Policy
from lossmith.policy.trial import sharing_is_exact

__all__ = ["gathered", "shard", "synchronizing", "whole"]

T = TypeVar("T")
_RUN = "lossmith_run"  # the name of `_run` in a model whose weights are held in parts


def shard(policy: Policy, mesh: Any) -> None:
    """From now on this rank holds its part of every weight; gradients are summed over the ranks, never averaged.

    The loss carries 1/Z of the whole update already. Matrix products run in the compute type as before: weights are
    gathered as they are, in float32. mesh: a DeviceMesh of one dimension.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    sharing_is_exact(policy)  # its trial calls the model in ways of its own
    for module in (*model_layers(policy.model), policy.model, *filter(None, [policy.value_head])):
        fully_shard(module, mesh=mesh)
    setattr(policy.model, _RUN, _run)
    register_fsdp_forward_method(policy.model, _RUN)
    for part in _parts(policy):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def gathered(model: Any, work: Callable[[], T]) -> T:
    """work(), which may read the weights of the model's root; it returns tensors, alone or in lists."""
    result: T = getattr(model, _RUN, _run)(work)
    return result


def _run(work: Callable[[], T]) -> T:
    return work()


@contextlib.contextmanager
def synchronizing(policy: Policy, now: bool) -> Iterator[None]:
    """Backward passes within add up on this rank alone; only where `now` is true are the ranks' sums added."""
    for part in _parts(policy):
        part.set_requires_gradient_sync(now, recurse=False)
    yield


@contextlib.contextmanager
def whole(policy: Policy) -> Iterator[None]:
    """Every rank has all weights within, and may make as many passes as it likes, without gradient: to sample, say."""
    parts = _parts(policy)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not policy.model, recurse=False)


def _parts(policy: Policy) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    roots: list[nn.Module] = [policy.model, *filter(None, [policy.value_head])]
    return [module for root in roots for module in root.modules() if isinstance(module, FSDPModule)]

"""What several ranks hold in parts: put together on rank 0 to be written down, and dealt out again.

It is written as one process writes it, so that any number of ranks goes on with it. While it is, rank 0 holds all of it
in the processor's memory; the others see one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lossmith.durable.checkpoint import optimizer_state, restore_optimizer
from lossmith.policy import Policy
from lossmith.policy.sharded import dealt_out, whole_tensor
from lossmith.ranks import Ranks

__all__ = ["Shards", "named_weights", "set_optimizer"]


class Shards:
    """Every rank makes one; what has no underscore is called on rank 0, and the others take part."""

    def __init__(self, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        self.policy, self.optimizer, self.ranks = policy, optimizer, ranks
        self._held: dict[str, Tensor] = {}  # on rank 0, whole, while they are on their way
        ranks.tasks |= {
            "gather_model": lambda: self._gather(self.policy.model.state_dict(keep_vars=True)),
            "gather_weights": lambda: self._gather(dict(named_weights(self.policy))),
            "gather_optimizer": lambda: self._gather(optimizer_state(self.optimizer)[0]),
            "deal_out": self._deal_out,
        }
        policy.gather = lambda: self._asked("gather_model")

    def weights(self) -> dict[str, Tensor]:
        """As `named_weights`, whole."""
        return self._asked("gather_weights")

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The tensors of `optimizer_state`, whole."""
        return self._asked("gather_optimizer")

    def restore(
        self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], numbers: dict[str, Any], version: int
    ) -> None:
        """Every rank takes its parts of these."""
        self._held = {**weights, **optimizer}  # names of weights begin with a letter, those of the optimizer do not
        shapes = {name: (x.shape, x.dtype) for name, x in optimizer.items()}
        self.ranks.call("deal_out", shapes, numbers, version)
        self._held = {}

    def _asked(self, task: str) -> dict[str, Tensor]:
        self.ranks.call(task)  # which gives nothing: what a task gives is sent from rank to rank as text
        held, self._held = self._held, {}
        return held

    def _gather(self, named: Mapping[str, Tensor]) -> None:
        """One that has two names, a head that is the embedding too, is one tensor again."""
        seen: dict[int, Tensor] = {}
        for name, x in named.items():
            if id(x) not in seen:
                full = whole_tensor(x)
                seen[id(x)] = full if self.ranks.rank else full.cpu()
            if self.ranks.rank == 0:
                self._held[name] = seen[id(x)]
            else:
                seen[id(x)] = x

    @torch.no_grad()
    def _deal_out(
        self, optimizer: dict[str, tuple[torch.Size, torch.dtype]], numbers: dict[str, Any], version: int
    ) -> None:
        for name, p in named_weights(self.policy):
            p.copy_(dealt_out(self._of_first(name, p.shape, p.dtype), p))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        tensors = {}
        for name, (shape, dtype) in optimizer.items():
            full, p = self._of_first(name, shape, dtype), parameters[int(name.split(".", 1)[0])]
            tensors[name] = dealt_out(full, p) if shape == p.shape else full  # a count of steps has no parts
        set_optimizer(self.optimizer, tensors, numbers)
        self.policy.version = version

    def _of_first(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor that rank 0 holds, on every rank."""
        full = torch.empty(shape, dtype=dtype) if self.ranks.rank else self._held[name].to(dtype).contiguous()
        dist.broadcast(full, src=0)
        return full


def named_weights(policy: Policy) -> list[tuple[str, Tensor]]:
    """What a checkpoint holds of the policy, by name."""
    trained = {id(p) for p in policy.parameters()}  # beside an adapter, the model is what it was
    named = [("policy." + n, p.detach()) for n, p in policy.model.named_parameters() if id(p) in trained]
    head = policy.value_head
    return named + ([] if head is None else [("value_head." + n, p.detach()) for n, p in head.named_parameters()])


def set_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """The state that was saved; its rates stay those of the recipe."""
    own = [{key: group[key] for key in ("base_lr", "weight_decay")} for group in optimizer.param_groups]
    restore_optimizer(optimizer, tensors, numbers)
    for group, recipe in zip(optimizer.param_groups, own, strict=True):
        group.update(recipe)

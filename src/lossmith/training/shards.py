"""What several ranks hold in parts: written and read by all of them at the same time, each its own.

What has to be whole (a policy's folder, its checksum) is put together on rank 0 a tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossmith.durable.checkpoint import Entries, optimizer_state, restore_optimizer
from lossmith.durable.parts import SavedTensors, write_parts
from lossmith.errors import RunError
from lossmith.policy import Policy
from lossmith.policy.sharded import whole_tensor
from lossmith.ranks import Ranks

__all__ = ["Shards", "named_weights", "of_optimizer", "read_state", "whole_weights"]

Take = Callable[[str, Tensor], None]


class Shards:
    """Every rank makes one; what has no underscore is called on rank 0, and the others take part."""

    def __init__(self, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        self.policy, self.optimizer, self.ranks = policy, optimizer, ranks
        self._take: Take = lambda name, x: None  # on rank 0, what becomes of a tensor that is whole
        ranks.tasks |= {
            "gather_model": lambda: self._gather(self.policy.model.state_dict(keep_vars=True)),
            "gather_weights": lambda: self._gather(dict(named_weights(self.policy))),
            "look_for_folder": self._look_for,
            "write_parts": self._write,
            "read_parts": self._read,
        }
        policy.gather = lambda take: self._asked("gather_model", take)

    def weights(self) -> dict[str, Tensor]:
        """As `named_weights`, whole."""
        whole: dict[str, Tensor] = {}
        self._asked("gather_weights", whole.__setitem__)
        return whole

    def _asked(self, task: str, take: Take) -> None:
        self._take = take
        self.ranks.call(task)  # which gives nothing: what a task gives is sent from rank to rank as text

    def _gather(self, named: Mapping[str, Tensor]) -> None:
        """Of a tensor with two names, a head that is the embedding too, it is done twice."""
        failed: Exception | None = None
        for name, x in named.items():
            full = whole_tensor(x)
            if self.ranks.rank == 0 and failed is None:
                try:
                    self._take(name, full.cpu())
                except Exception as error:  # a full disk, say: the others, which gather to the end, come first
                    failed = error
        if failed is not None:
            raise failed

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def look_for(self, folder: Path) -> None:
        """RunError: a rank does not see the run's folder, so could not write its part of a checkpoint."""
        self.ranks.call("look_for_folder", str(folder.absolute()))

    def _look_for(self, folder: str) -> None:
        if not Path(folder).is_dir():
            raise RunError(
                f"the run's folder {folder!r} is not seen by every rank. With shard = true each writes its part of a "
                "checkpoint there: put it on a disk that all machines share (runs = ...), or do without checkpoints "
                "(checkpoint_minutes = 0 and checkpoint_every = 0)."
            )

    def write(self, folder: Path) -> Entries:
        """Weights and optimizer, into a folder that all see; what a manifest says of the files."""
        written = self.ranks.call("write_parts", str(folder.absolute()))
        return {name: entry for entries in written for name, entry in entries.items()}

    def _write(self, folder: str) -> Entries:
        named = dict(named_weights(self.policy)) | optimizer_state(self.optimizer)[0]
        return write_parts(Path(folder), named, self.ranks.rank)

    def read(self, folder: Path, numbers: dict[str, Any], version: int) -> None:
        """As it was written, by whatever number of ranks. numbers: the rest of `optimizer_state`."""
        self.ranks.call("read_parts", str(folder.absolute()), numbers, version)

    def _read(self, folder: str, numbers: dict[str, Any], version: int) -> None:
        read_state(SavedTensors(Path(folder)), self.policy, self.optimizer, numbers)
        self.policy.version = version


def named_weights(policy: Policy) -> list[tuple[str, Tensor]]:
    """What a checkpoint holds of the policy, by name."""
    trained = {id(p) for p in policy.parameters()}  # beside an adapter, the model is what it was
    named = [("policy." + n, p.detach()) for n, p in policy.model.named_parameters() if id(p) in trained]
    head = policy.value_head
    return named + ([] if head is None else [("value_head." + n, p.detach()) for n, p in head.named_parameters()])


def whole_weights(policy: Policy, shards: Shards | None) -> dict[str, Tensor]:
    """`named_weights`, put together where the ranks hold them in parts."""
    return dict(named_weights(policy)) if shards is None else shards.weights()


def of_optimizer(name: str) -> bool:
    """Whether a checkpoint's tensor is the optimizer's: its name begins with a parameter's number, "3.exp_avg"."""
    return name[0].isdigit()


def read_state(saved: SavedTensors, policy: Policy, optimizer: torch.optim.Optimizer, numbers: dict[str, Any]) -> None:
    """Weights and the optimizer's state, of this rank's parts where it holds parts; its rates stay the recipe's."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in saved.kinds.items():
        if of_optimizer(name):
            p = parameters[int(name.split(".", 1)[0])].detach()
            of_weights = shape == p.shape  # a count of steps has no rows
            tensors[name] = torch.empty_like(p, dtype=dtype) if of_weights else torch.empty(shape, dtype=dtype)
    saved.read_into({**dict(named_weights(policy)), **tensors})
    own = [{key: group[key] for key in ("base_lr", "weight_decay")} for group in optimizer.param_groups]
    restore_optimizer(optimizer, tensors, numbers)
    for group, recipe in zip(optimizer.param_groups, own, strict=True):
        group.update(recipe)

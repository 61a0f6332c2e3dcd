"""Old log-probabilities from the update's own forward pass, where nothing was learned since completions were written.

Before its first update the policy is the old one, so a pass without a gradient beforehand would say the same.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from lossmith.losses import Batch
from lossmith.policy.sending import sent
from lossmith.ranks import Ranks

__all__ = ["FirstPass"]


class FirstPass:
    """Every rank has one, and notes what its micro-batches say; rank 0 puts them together."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._noted: list[tuple[Tensor, Tensor]] = []
        ranks.tasks["first logp"] = lambda: self._noted

    def begin(self) -> None:
        """An update begins."""
        self._noted = []

    def note(self, rows: Tensor, logp: Tensor) -> None:
        """rows: their numbers in the update. logp: [rows, T]."""
        self._noted.append((rows, logp.detach().cpu()))

    def of_round(self, batch: Batch, rows: Tensor) -> Tensor:
        """[N, T], in the order of the round's batch, of whose rows the update was made in this order."""
        old = torch.zeros(batch.valid.shape, dtype=batch.dtype, device=batch.valid.device)
        for of_update, logp in chain.from_iterable(self._ranks.call("first logp")):
            old[sent(rows[of_update], old.device)] = logp.to(old)
        return old

"""What an extra term is."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lossmith.losses.batch import Batch
from lossmith.losses.piece import Piece

__all__ = ["Extra"]


class Extra(Piece):
    """A term [N, T] of the loss; masks and mismatch weights do not touch it."""

    through: ClassVar[str] = "logp"  # the field of Batch that its gradient goes through

    def value(self, batch: Batch, advantage: Tensor) -> Tensor:
        """With gradient into logp."""
        raise NotImplementedError

    def slope(self, batch: Batch, advantage: Tensor) -> Tensor:
        """d value/dlogp [N, T] in closed form; asked of terms through "logp"."""
        raise NotImplementedError

    def vocabulary_slope(self, batch: Batch) -> Tensor:
        """d value/d vocab_logp [N, T, V] in closed form; asked of terms through "vocab_logp"."""
        raise NotImplementedError

    def formula(self) -> str | None:
        """The term with its coefficient, `... where a = ...; b = ...` if it names parts of it; None: no term."""
        return None

    def code(self) -> list[str]:
        """Lines of plain torch that add the term to `loss`."""
        return []

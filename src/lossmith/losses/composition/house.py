"""The numbers of one library, as its presets have them: what an option gets there when it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lossmith.losses.axes.advantage import GroupStd
from lossmith.losses.piece import Piece

__all__ = ["House"]


@dataclass(frozen=True)
class House:
    """The pieces of a library's presets."""

    pieces: tuple[tuple[str, Piece], ...]  # (axis, piece), the library's main loss first
    shared: ClassVar[tuple[str, ...]] = ("eps", "singleton", "mismatch_level", "mismatch_low", "mismatch_high")

    def of(self, axis: str, option: type[Piece]) -> dict[str, Any]:
        """{flat name: number}: of the same option in the library, else what means the same in every option."""
        numbers: dict[str, Any] = {}
        for where, piece in reversed(self.pieces):
            if where == axis or (where == "advantage_scale" and _adds_to_std(option)):
                numbers |= {k: v for k, v in piece.flat().items() if k in self.shared}
        for where, piece in reversed(self.pieces):
            if where == axis and type(piece) is option:
                numbers |= piece.flat()
        return numbers


def _adds_to_std(option: type[Piece]) -> bool:
    """Whether its eps is the usual one of a standard deviation, as that of a scale is."""
    return getattr(option, "eps", None) == GroupStd.eps

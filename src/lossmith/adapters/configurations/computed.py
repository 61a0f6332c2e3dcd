"""A value that the file does not hold: it is made where the script runs, or where the trainer starts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Computed"]


@dataclass(frozen=True)
class Computed:
    """A value that is not known from the file alone, as it is written there."""

    text: str

    def __str__(self) -> str:
        return self.text

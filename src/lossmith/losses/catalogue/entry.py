"""One entry of the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lossmith.losses.policy_loss import PolicyLoss

__all__ = ["Entry"]


@dataclass(frozen=True)
class Entry:
    """A named loss: `build` gives its composition with the paper's defaults."""

    name: str
    year: int
    paper: str  # arXiv id, or the book's equation
    summary: str  # one line
    build: Callable[[], PolicyLoss]
    fixed: tuple[str, ...] = ()  # choices without which it would be another loss
    demonstration: bool = False  # kept to be looked at, not trained with

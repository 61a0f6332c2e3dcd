"""One entry of the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lossmith.losses.loss import Loss

__all__ = ["Entry"]


@dataclass(frozen=True)
class Entry:
    """A named loss: `build` gives its composition with the paper's (or the library's) defaults."""

    name: str
    year: int
    paper: str  # arXiv id, or the book's equation, or where a library says it
    summary: str  # one line
    build: Callable[..., Loss]
    fixed: tuple[str, ...] = ()  # choices without which it would be another loss
    demonstration: bool = False  # kept to be looked at, not trained with
    example: Mapping[str, Any] = field(default_factory=dict)  # values for parameters that have no agreed default
    aliases: tuple[str, ...] = ()
    family: str = ""  # the file of the catalogue it stands in
    preset_of: str = ""  # for name@library: the loss whose defaults these are
    origin: str = ""  # for a user's loss: "module:function", or the entry point

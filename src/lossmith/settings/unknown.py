"""A setting that a recipe does not have: another library's word for one, or a parameter of the loss."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

from lossmith.errors import nearest
from lossmith.losses import all_parameters
from lossmith.losses.composition.foreign import FOREIGN

__all__ = ["instead_of", "is_word"]


def is_word(key: str) -> bool:
    """Whether it is a parameter of a loss, or another library's word for one or for a setting."""
    return key in FOREIGN or key in all_parameters()


def instead_of(key: str, value: Any, known: Iterable[str]) -> str:
    """What to write instead, as the tail of an error message. value: ... where it is not known."""
    known, word = list(known), FOREIGN.get(key)
    example = f"grpo({key}={'...' if value is ... else reprlib.repr(value)})"
    if "allow_traps" not in known or (word is not None and word.setting and word.setting not in known):
        return nearest(key, known)
    if word is not None and word.setting:
        return f" It is {word.whose}'s name for {word.setting} here."
    if word is not None:
        return f' It is a parameter of the loss, as in loss = "grpo(beta=0.04)": {word.said(key, value, ())}'
    if key in all_parameters():
        return f' It is a parameter of the loss: write loss = "{example}".'
    return nearest(key, known)

"""Which texts of a recipe are paths, and from where they are meant."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossmith.errors import RecipeError
from lossmith.files import at_home
from lossmith.scorers import list_scorers

__all__ = ["absolute"]

_HUB_NAME = re.compile(r"\w[\w.\-]*/[\w.\-]+")
_DATA = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".db")


def absolute(field: str, value: Any, base: Path) -> Any:
    """The value of a recipe's field, with the paths in it absolute. What is no path stays as it is."""
    scorer = field in ("scorer", "watch")
    if isinstance(value, Mapping):  # several scorers, or the parts of a loss
        return {
            key: absolute(field, part, base) if key in ("scorers", "ensemble", "steps", "name", "function") else part
            for key, part in value.items()
        }
    if isinstance(value, (list, tuple)) and scorer:
        return [absolute(field, part, base) for part in value]
    if not isinstance(value, (str, Path)) or value == "default":
        return value
    if field == "teacher" and value == "self":
        return value
    text = str(value)
    file, code, function = text.partition(".py:")
    if code:
        return _from(base, file + ".py") + ":" + function
    if field == "loss" or ":" in text or (scorer and text in list_scorers()):
        return value  # a name, an address, or module:function
    place = _from(base, text)
    if field == "runs" or Path(place).exists():
        return place
    on_hub = _HUB_NAME.fullmatch(text) and not text.endswith(_DATA)
    return value if on_hub or (scorer and "/" not in text) else place


def _from(base: Path, text: str) -> str:
    return os.path.abspath(base / at_home(text, RecipeError))

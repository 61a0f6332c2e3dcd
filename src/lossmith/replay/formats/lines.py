"""JSON lines, and values of them: what a damaged or foreign file is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lossmith.errors import RunError
from lossmith.files import read_text

__all__ = ["Record", "json_records", "shown_keys"]


class Record(dict[str, Any]):
    """One line of a file, which knows where it stands."""

    where = ""

    def numbers(self, key: str) -> list[float]:
        """A list of numbers. RunError: it is none."""
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(x, (int, float)) for x in value):
            raise RunError(f"{self.where}: {key} must be a list of numbers, not {_short(value)}.")
        return [float(x) for x in value]

    def number(self, key: str) -> float:
        """A number. RunError: it is none."""
        value = self.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise RunError(f"{self.where}: {key} must be a number, not {_short(value)}.")
        return float(value)

    def list_of(self, key: str) -> list[Any]:
        """A list. RunError: it is none."""
        value = self.get(key)
        if not isinstance(value, list):
            raise RunError(f"{self.where}: {key} must be a list, not {_short(value)}.")
        return value


def json_records(path: Path) -> list[Record]:
    """The lines of a file, each an object. RunError: a line is not."""
    found = []
    for number, line in enumerate(read_text(path, RunError, "rollout file").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise RunError(f"{where}: the line is not JSON.") from None
        if not isinstance(value, dict):
            raise RunError(f"{where}: the line must be an object with the fields of one completion.")
        record = Record(value)
        record.where = where
        found.append(record)
    return found


def shown_keys(keys: Any) -> str:
    """Some names of fields, for a message."""
    names = [str(k) for k in keys]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""JSON lines, and values of them: what a damaged or foreign file is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lossmith.errors import RunError
from lossmith.files import read_text

__all__ = ["Record", "json_records", "shown_keys"]

LARGEST = 1e100  # sums and squares of such numbers are still numbers


class Record(dict[str, Any]):
    """One line of a file, which knows where it stands."""

    where = ""

    def numbers(self, key: str) -> list[float]:
        """A list of numbers. RunError: it is none, or has one that no log-probability or score is."""
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(x, (int, float)) for x in value):
            raise RunError(f"{self.where}: {key} must be a list of numbers, not {_short(value)}.")
        return [self._sane(key, x) for x in value]

    def number(self, key: str, default: float | None = None) -> float:
        """A number; `default` where the field is absent. RunError: it is none."""
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise RunError(f"{self.where}: {key} must be a number, not {_short(value)}.")
        return self._sane(key, value)

    def whole(self, key: str, default: int = 0) -> int:
        """A whole number; `default` where the field is absent. RunError: it is none."""
        value = self.number(key, default)
        if value != value or value % 1:
            raise RunError(f"{self.where}: {key} must be a whole number, not {_short(self.get(key))}.")
        return int(value)

    def list_of(self, key: str) -> list[Any]:
        """A list. RunError: it is none."""
        value = self.get(key)
        if not isinstance(value, list):
            raise RunError(f"{self.where}: {key} must be a list, not {_short(value)}.")
        return value

    def ids(self, key: str) -> list[int]:
        """A list of token ids. RunError: it is none."""
        value = self.list_of(key)
        if not all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**31 for x in value):
            raise RunError(f"{self.where}: {key} must be a list of token ids, not {_short(value)}.")
        return value

    def objects(self, key: str) -> list[Record]:
        """A list of objects, none where the field is absent or null. RunError: it is none."""
        value = self.get(key) or []
        if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
            raise RunError(f"{self.where}: {key} must be a list of objects, not {_short(value)}.")
        return [Record.at(self.where, x) for x in value]

    def object(self, key: str) -> Record:
        """An object, empty where the field is absent or null. RunError: it is none."""
        value = self.get(key) or {}
        if not isinstance(value, dict):
            raise RunError(f"{self.where}: {key} must be an object, not {_short(value)}.")
        return Record.at(self.where, value)

    def name(self, key: str) -> Any:
        """What tells one thing from another: text or a number. RunError: it is neither."""
        value = self.get(key)
        if isinstance(value, (list, dict)):
            raise RunError(f"{self.where}: {key} must be text or a number, not {_short(value)}.")
        return value

    @classmethod
    def at(cls, where: str, value: dict[str, Any]) -> Record:
        """These fields, which stand there."""
        record = cls(value)
        record.where = where
        return record

    def _sane(self, key: str, value: float) -> float:
        if value == value and abs(value) > LARGEST:
            raise RunError(f"{self.where}: {key} = {_short(value)} is no score or log-probability: it is too large.")
        return float(value)


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
        found.append(Record.at(where, value))
    return found


def shown_keys(keys: Any) -> str:
    """Some names of fields, for a message."""
    names = [str(k) for k in keys]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

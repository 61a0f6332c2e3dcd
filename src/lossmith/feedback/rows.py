"""The rows of any file of preferences or judgements; an error takes the place of a row that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lossmith.errors import FeedbackError, PromptError, nearest
from lossmith.files import at_home
from lossmith.prompts import read_rows

__all__ = ["SUFFIXES", "is_database", "listed", "read_file", "refuse"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_SHOWN = 3

Row = Mapping[str, Any]


def is_database(path: Path) -> bool:
    """Whether it is a judgement database, by its content; where there is none yet, by its suffix."""
    try:
        with path.open("rb") as file:
            begins = file.read(16)
    except OSError:
        begins = b""
    return begins == b"SQLite format 3\0" or (not begins and path.suffix.lower() == ".db")


def read_file(path: Path) -> Iterator[tuple[str, Row | FeedbackError]]:
    """(where, row) of each row, or what is wrong with it. FeedbackError: the file cannot be read at all."""
    place = at_home(path, FeedbackError)
    if not place.exists():
        near = nearest(place.name, [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else [])
        raise FeedbackError(f"there is no preferences file {str(path)!r}.{near if 'Did you mean' in near else ''}")
    if place.is_file() and place.suffix.lower() not in SUFFIXES:
        raise FeedbackError(
            f"{path}: preferences and judgements are read from {', '.join(SUFFIXES)} and .db files, not "
            f"{path.suffix or 'no suffix'!r}."
        )
    try:
        for where, row in read_rows(place):
            if isinstance(row, PromptError):
                yield where, FeedbackError(str(row))
            elif not _is_text(row):
                wrong = "holds half of a surrogate pair, which is no text. Write it as UTF-8."
                yield where, FeedbackError(f"{where}: {wrong}")
            else:
                yield where, row
    except PromptError as error:
        raise FeedbackError(str(error)) from None


def _is_text(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse(name: str, bad: Iterable[FeedbackError]) -> FeedbackError:
    """The error of a file that holds bad rows, which are not to be left out."""
    bad = list(bad)
    return FeedbackError(
        f"{name}: {len(bad)} of its rows cannot be used, and nothing was taken from it.\n{listed(bad)}\nCorrect the "
        "file, or leave such rows out and count them: skip_bad = true."
    )


def listed(bad: list[FeedbackError]) -> str:
    """The first of them, a line each, and how many more there are."""
    more = [f"... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    return "\n".join([f"  {error}" for error in bad[:_SHOWN]] + more)

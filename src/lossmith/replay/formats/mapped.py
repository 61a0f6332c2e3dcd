"""A schema of one's own: which column of a file is which field (`--map reward=score,group=uid`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lossmith.errors import RunError, nearest
from lossmith.losses.batch import FIELDS
from lossmith.replay.formats.lines import Record, json_records, shown_keys
from lossmith.replay.recorded import Row

__all__ = ["rows"]

TEXTS = ("prompt", "completion", "group", "step", "tokens", "prompt_tokens", "advantage")


def rows(path: Path, mapping: Mapping[str, str]) -> list[Row]:
    """The completions, by the columns that the mapping names. RunError: a name on either side is unknown."""
    known = [*TEXTS, *(name for name in FIELDS if name not in ("logp", *TEXTS))]
    for ours in mapping:
        if ours not in known:
            raise RunError(f"--map {ours}=...: there is no field {ours!r}.{nearest(ours, known)}")
    records = _parquet(path) if path.suffix == ".parquet" else json_records(path)
    for ours, theirs in mapping.items():
        if records and theirs not in records[0]:
            raise RunError(f"--map {ours}={theirs}: {path} has no {theirs!r}; it has {shown_keys(records[0])}.")
    return [_row(record, mapping) for record in records]


def _parquet(path: Path) -> list[Record]:
    try:
        table = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise RunError(f"{str(path)!r} cannot be read as a parquet file: {error}") from None
    found = []
    for number, row in enumerate(table, 1):
        record = Record(row)
        record.where = f"{path}, row {number}"
        found.append(record)
    return found


def _row(record: Record, mapping: Mapping[str, str]) -> Row:
    def text(name: str) -> str:
        return str(record.get(mapping.get(name, ""), ""))

    tokens = record.list_of(mapping["tokens"]) if "tokens" in mapping else None
    row = Row(0, step=int(record.number(mapping["step"])) if "step" in mapping else 0)
    row.prompt, row.completion, row.tokens = text("prompt"), text("completion"), tokens
    row.group = record.get(mapping["group"]) if "group" in mapping else (row.prompt or None)
    if "prompt_tokens" in mapping:
        row.prompt_tokens = record.list_of(mapping["prompt_tokens"])
    for ours, theirs in mapping.items():
        if ours in TEXTS:
            continue
        if isinstance(record.get(theirs), list):
            (row.by_row if "NK" in FIELDS[ours].shapes else row.by_token)[ours] = record.numbers(theirs)
        else:
            row.by_row[ours] = record.number(theirs) if FIELDS[ours].kind not in ("flag", "whole") else record[theirs]
    given: Any = record.get(mapping["advantage"]) if "advantage" in mapping else None
    row.advantage = record.numbers(mapping["advantage"]) if isinstance(given, list) else given
    lengths = {len(x) for x in (tokens, *row.by_token.values()) if x is not None}
    if len(lengths) > 1:
        raise RunError(f"{record.where}: its lists by token have different lengths: {sorted(lengths)}.")
    row.length = lengths.pop() if lengths else max(1, len(row.completion.encode()))
    return row

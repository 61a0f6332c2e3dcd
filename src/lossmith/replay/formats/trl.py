"""TRL's completions_*.parquet (`log_completions=True`; GRPO, TRL 1.16): text, rewards and advantages, no token ids."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lossmith.errors import RunError
from lossmith.replay.recorded import Row

__all__ = ["rows"]

OWN = ("step", "prompt", "completion", "advantage")


def rows(path: Path) -> tuple[list[Row], list[str]]:
    """(completions, notes). The reward is the sum of its columns, and bytes of text stand for tokens."""
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise RunError(f"{str(path)!r} cannot be read as a parquet file: {error}") from None
    numeric = [f.name for f in table.schema if f.name not in OWN and _is_number(f.type)]
    if not numeric:
        raise RunError(f"{path}: no column of rewards beside {', '.join(table.column_names)}.")
    notes = ["token ids are not recorded: bytes of the text stand for tokens"]
    if len(numeric) > 1:
        notes.append(f"the reward is the sum of {', '.join(numeric)}, each counted once; another: --map reward=COLUMN")
    return [_row(row, numeric) for row in table.to_pylist()], notes


def _row(row: dict[str, Any], rewards: list[str]) -> Row:
    prompt, completion = _text(row["prompt"]), _text(row["completion"])
    parts = [float("nan") if row[name] is None else float(row[name]) for name in rewards]
    made = Row(
        max(1, len(completion.encode())), prompt, int(row["step"]), prompt, completion, advantage=row["advantage"]
    )
    made.by_row["reward"] = sum(x for x in parts if not math.isnan(x))
    return made


def _text(value: Any) -> str:
    """Text, or the messages of a conversation."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _is_number(kind: Any) -> bool:
    return bool(pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind))

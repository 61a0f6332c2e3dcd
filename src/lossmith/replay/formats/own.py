"""Lossmith's own files: rollouts/step-00000.parquet of a run (docs/rollout-files.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lossmith.errors import RunError
from lossmith.losses.batch import FIELDS
from lossmith.replay.recorded import Row
from lossmith.rollouts import check_schema

__all__ = ["rows"]


def rows(path: Path) -> list[Row]:
    """The completions that have a score, with what the loss saw of them."""
    try:
        check_schema(path)
        table = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise RunError(f"{str(path)!r} cannot be read as a file of rollouts: {error}") from None
    step = re.fullmatch(r"step-(\d+)", path.stem)
    return [_row(row, int(step[1]) if step else 0) for row in table if row["score"] is not None]


def _row(row: dict[str, Any], step: int) -> Row:
    made = Row(
        len(row["tokens"]), row["prompt_id"], step, _last_user(row["prompt"]), row["completion"], row["prompt_tokens"],
        row["tokens"], advantage=row.get("credit.advantage") or row["advantage"],
    )  # fmt: skip
    made.sampling = (row["temperature"], row["top_p"], row["top_k"])
    made.sample = row["sample"]
    made.by_token["behavior_logp"] = row["behavior_logp"]
    made.by_row |= {"reward": row["score"], "truncated": row["truncated"]}
    for column, value in row.items():
        name = column.removeprefix("seen.")
        if name == column or name not in FIELDS or name == "group" or value is None:
            continue
        if isinstance(value, list):
            made.by_row.pop(name, None)
            made.by_token[name] = value
        else:
            made.by_row[name] = value
    return made


def _last_user(messages: str) -> str:
    return str(json.loads(messages)[-1].get("content", ""))

"""What was recorded of a training step, whoever recorded it: rows of a file, and the fields of Batch made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import RunError
from lossmith.losses.batch import FIELDS
from lossmith.rollouts import pad_rows

__all__ = ["Recorded", "Row", "recorded", "without_doubles"]


@dataclass
class Row:
    """One completion as a file has it. What the file lacks stays None or absent."""

    length: int  # response tokens; of text without ids, its bytes stand for them
    group: Any = None  # equal for completions of one prompt; None where that is not recorded
    step: int = 0
    prompt: str = ""
    completion: str = ""
    prompt_tokens: list[int] | None = None
    tokens: list[int] | None = None
    mask: list[bool] | None = None  # [length]; all of them where it is None
    by_token: dict[str, list[float]] = field(default_factory=dict)  # fields of Batch, [length]
    by_row: dict[str, Any] = field(default_factory=dict)  # fields of Batch, one value; reward_parts: a list
    advantage: float | list[float] | None = None  # as its trainer computed it
    sampling: tuple[float, float, int] = (1.0, 1.0, 0)  # temperature, top_p, top_k
    sample: int | None = None  # which of its group, where that is recorded


@dataclass(frozen=True)
class Recorded:
    """One step of rollouts. fields: those of Batch that the file holds, float64; N rows, T the longest completion."""

    source: str  # whose file it is: "Lossmith", "TRL", ...
    place: str  # the file
    step: int  # as the file counts it
    fields: dict[str, Tensor]
    rows: tuple[Row, ...]
    advantage: Tensor | None  # [N, T], as recorded
    notes: tuple[str, ...] = ()  # what was left out or stands in for something else

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def origin(self) -> dict[str, str]:
        """{field of Batch: "recorded", or "unknown"} of every field that some loss reads."""
        return {name: "recorded" if name in self.fields else "unknown" for name in FIELDS if name != "logp"}


def recorded(rows: Sequence[Row], source: str, place: str, notes: Sequence[str] = ()) -> list[Recorded]:
    """The rows, step by step. RunError: there is none."""
    if not rows:
        raise RunError(f"{place} holds no completion with a score.")
    for number, row in enumerate(rows, 1):
        advantages = {"advantages": row.advantage} if isinstance(row.advantage, list) else {}
        for name, values in (row.by_token | advantages | ({"mask": row.mask} if row.mask else {})).items():
            if len(values) != row.length:
                raise RunError(
                    f"{place}: completion {number} has {row.length} tokens, and {len(values)} values of {name}."
                )
    steps = dict.fromkeys(row.step for row in rows)
    return [_step([r for r in rows if r.step == step], step, source, place, list(notes)) for step in steps]


def _step(rows: list[Row], step: int, source: str, place: str, notes: list[str]) -> Recorded:
    mask = pad_rows([torch.tensor(r.mask or [True] * r.length, dtype=torch.float64) for r in rows])[0].bool()
    fields: dict[str, Tensor] = {"mask": mask}
    for name in dict.fromkeys(name for r in rows for name in (*r.by_token, *r.by_row)):
        values = [r.by_token.get(name, r.by_row.get(name)) for r in rows]
        known = sum(v is not None for v in values)
        if known < len(rows):
            notes.append(f"{name} is recorded for {known} of {len(rows)} completions, and is left out")
        elif name in rows[0].by_token:
            fields[name] = pad_rows([torch.tensor(v, dtype=torch.float64) for v in values])[0]
        else:
            fields[name] = torch.tensor(values, dtype=_KINDS.get(FIELDS[name].kind, torch.float64))
    if all(r.group is not None for r in rows):
        names = {key: i for i, key in enumerate(dict.fromkeys(r.group for r in rows))}
        fields["group"] = torch.tensor([names[r.group] for r in rows])
    return Recorded(source, place, step, fields, tuple(rows), _advantages(rows, mask), tuple(dict.fromkeys(notes)))


_KINDS = {"flag": torch.bool, "whole": torch.int64}


def _advantages(rows: Sequence[Row], mask: Tensor) -> Tensor | None:
    if any(r.advantage is None for r in rows):
        return None
    wide = [r.advantage if isinstance(r.advantage, list) else [r.advantage] * r.length for r in rows]
    return pad_rows([torch.tensor(w, dtype=torch.float64) for w in wide])[0] * mask


def without_doubles(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """(rows, how many repeated an earlier step's): TRL logs one generation batch under several step numbers."""
    seen: dict[Any, int] = {}
    kept = []
    for row in rows:
        key = (row.prompt, row.completion, repr(sorted(row.by_row.items())), repr(row.advantage))
        if seen.setdefault(key, row.step) == row.step:
            kept.append(row)
    return kept, len(rows) - len(kept)

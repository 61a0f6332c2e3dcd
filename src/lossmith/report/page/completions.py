"""The completions that a page shows: a table of them, and those that stand out."""

from __future__ import annotations

import heapq
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from lossmith.report.page.folder import RunSeen
from lossmith.rollouts import Rollout

__all__ = ["ROWS", "Pair", "Shown", "pairs", "shown"]

ROWS = 2000  # of the table: more would make a page that a phone cannot scroll
OUTSTANDING = 3  # best, worst and most pushed completions of a run


@dataclass(frozen=True)
class Shown:
    """A completion. step: as people count it. command: what explains it. push: share of its step's push, 0 to 1."""

    run: str
    step: int
    prompt: str
    command: str
    sample: int
    text: str
    score: float | None
    error: str
    advantage: float | None
    push: float | None
    tokens: int
    cut: bool


@dataclass(frozen=True)
class Pair:
    """A held-out prompt's completion before and after. said: why it is shown."""

    prompt: str
    before: Shown
    after: Shown
    said: str = ""

    @property
    def change(self) -> float | None:
        first, second = self.before.score, self.after.score
        return None if first is None or second is None else second - first


@dataclass
class Found:
    """What was read of a run's steps."""

    best: list[Shown]
    worst: list[Shown]
    pushed: list[Shown]
    table: list[Shown]
    total: int = 0  # completions in the files
    steps: int = 0  # files of steps that were read
    in_table: int = 0  # of those, the ones whose completions are in the table


def shown(run: RunSeen, rows: int = ROWS) -> Found:
    """The completions of a run: the table has those of evenly spaced steps where all would be more than `rows`."""
    found = Found([], [], [], [])
    files = run.step_files
    chosen = _evenly(list(files), rows, {step: _count(file) for step, file in files.items()})
    for step, file in files.items():
        made = _of_step(run, step, file)
        if not made:
            continue
        found.total, found.steps = found.total + len(made), found.steps + 1
        scored = [x for x in made if x.score is not None]
        found.best = heapq.nlargest(OUTSTANDING, _fresh(found.best, scored), key=lambda x: x.score or 0.0)
        found.worst = heapq.nsmallest(OUTSTANDING, _fresh(found.worst, scored), key=lambda x: x.score or 0.0)
        moved = [x for x in scored if x.push]
        found.pushed = heapq.nlargest(OUTSTANDING, [*found.pushed, *moved], key=lambda x: x.push or 0.0)
        if step in chosen:
            found.table += made
            found.in_table += 1
    return found


def _fresh(kept: Sequence[Shown], more: Iterable[Shown]) -> list[Shown]:
    """Without a text that stands there already: three times the same says nothing."""
    by_text: dict[tuple[str, str], Shown] = {}
    for one in (*kept, *more):
        by_text.setdefault((one.prompt, one.text), one)
    return list(by_text.values())


def _evenly(steps: Sequence[int], rows: int, count: dict[int, int]) -> set[int]:
    """Steps from the first to the last, as many as together have no more than `rows` completions; one at least."""
    total, largest = sum(count.values()), max(count.values(), default=1)
    if total <= rows or len(steps) < 2:
        return set(steps)
    room = max(rows // max(largest, 1), 1)
    return {steps[round(i * (len(steps) - 1) / max(room - 1, 1))] for i in range(min(room, len(steps)))}


def _count(file: Path) -> int:
    try:
        return int(pyarrow.parquet.read_metadata(file).num_rows)
    except (OSError, pyarrow.ArrowException):
        return 0  # reading it says what is wrong


def _of_step(run: RunSeen, step: int, file: Path) -> list[Shown]:
    rollouts = run.read(file)
    pushes = _pushes(file) if rollouts else []
    about = f"lossmith explain {shlex.quote(str(run.path))} --step {step}"
    return [
        _shown(run.name, step + 1, r, push, f"{about} --prompt {shlex.quote(r.prompt.id)} --sample {r.sample}")
        for r, push in zip(rollouts, pushes, strict=True)
    ]


def _shown(run: str, step: int, r: Rollout, push: float | None = None, command: str = "") -> Shown:
    value = None if r.score is None else r.score.value
    error = "" if r.score is None else r.score.error or ("abstained" if r.score.abstained else "")
    return Shown(
        run, step, r.prompt.text, command, r.sample, r.completion, value, error, r.advantage, push,
        len(r.completion_ids), r.truncated,
    )  # fmt: skip


def _pushes(file: Path) -> list[float | None]:
    """Σ|A·u/Z| over each completion's tokens, as a share of the step's: -dL/dlogp at ratio 1, without other terms."""
    names = ["credit.advantage", "credit.weight", "credit.mismatch"]
    columns = set(pyarrow.parquet.read_schema(file).names)
    read = [name for name in names if name in columns]
    table = pyarrow.parquet.read_table(file, columns=read or ["sample"]).to_pylist()
    if not set(names[:2]) <= columns:
        return [None] * len(table)
    sums = [_push([row[name] for name in read]) for row in table]
    total = math.fsum(x for x in sums if x is not None)
    return [None if x is None else x / total if total else 0.0 for x in sums]


def _push(parts: Sequence[list[float] | None]) -> float | None:
    present = [p for p in parts if p is not None]
    if len(present) < len(parts):
        return None
    return math.fsum(abs(math.prod(token)) for token in zip(*present, strict=True))


def pairs(run: RunSeen) -> list[Pair]:
    """The held-out prompts' completions before and after, in the order of the file, those that changed most marked."""
    first, second = ({r.prompt.id: r for r in run.held_out(when)} for when in ("before", "after"))
    made = [
        Pair(r.prompt.text, _shown(run.name, 0, r), _shown(run.name, 0, second[name]))
        for name, r in first.items()
        if name in second
    ]
    moved = sorted((p for p in made if p.change), key=lambda p: p.change or 0.0)
    ends = {id(moved[0]): "the greatest fall", id(moved[-1]): "the greatest rise"} if moved else {}
    ends = {key: said for p in moved for key, said in ends.items() if key == id(p) and _as_said(p, said)}
    return [Pair(p.prompt, p.before, p.after, ends.get(id(p), "")) for p in made]


def _as_said(pair: Pair, said: str) -> bool:
    return (pair.change or 0.0) < 0 if "fall" in said else (pair.change or 0.0) > 0

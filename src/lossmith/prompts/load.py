"""Rows of a file or of memory as prompts: what is the prompt, what travels with it, and what may not be there."""

from __future__ import annotations

import importlib.resources
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lossmith.errors import PromptError, nearest
from lossmith.prompts.content import is_blank, read_content
from lossmith.prompts.prompt import SYSTEM_COLUMNS, Content, Prompt, PromptSet
from lossmith.prompts.sources import rows_of

__all__ = ["default_prompts_path", "is_target", "load_prompts"]

# Columns that hold what a policy must not be given: the loss reads the policy's own outputs, never a target.
# Only letters are compared, in lower case: "Ground Truth", "ground-truth", "groundTruth" and "answer_2" are all meant.
TARGETS = frozenset(
    ("answer", "answerkey", "answers", "bestanswer", "canonicalsolution", "chosen", "chosenresponse", "completion",
     "completions", "correctanswer", "correctanswers", "expected", "expectedanswer", "expectedoutput",
     "expectedresponse", "finalanswer", "gold", "goldanswer", "goldanswers", "goldlabel", "goldresponse",
     "groundtruth", "groundtruths", "gt", "label", "labels", "output", "outputs", "reference", "referenceanswer",
     "referenceanswers", "referenceoutput", "referenceresponse", "references", "referencesolution", "rejected",
     "rejectedresponse", "response", "responses", "solution", "solutions", "target", "targets")
)  # fmt: skip
ASKING = ("instruction", "question", "query")  # columns that others join `input` and `history` to
SCORER_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
# Where other people's files keep the prompt.
USUAL = ("question", "instruction", "messages", "conversations", "conversation", "query", "problem", "input", "text")
_TABLE_LINE = re.compile(r"\.[ct]sv:\d+$", re.IGNORECASE)


def is_target(column: str) -> bool:
    """Whether a column of this name holds what a policy must not be given, unless its user says so."""
    return re.sub("[^a-z]", "", column.lower()) in TARGETS


def default_prompts_path() -> Path:
    """The shipped prompts."""
    return Path(str(importlib.resources.files("lossmith").joinpath("data/prompts.jsonl")))


def load_prompts(
    source: str | Path | Iterable[str | Mapping[str, Any]],
    *,
    pass_columns: Sequence[str] = (),
    column: str = "prompt",
    split: str = "train",
    limit: int | None = None,
) -> PromptSet:
    """Read prompts from a file (JSONL, JSON, CSV, TSV, TXT, parquet), a `datasets` folder, a hub name, or memory.

    Rows whose prompt and columns are all the same are one prompt. A `system` column becomes the system message, and
    the `input` of an `instruction` is joined to it.

    pass_columns: target-like columns (answer, label, ...) that the scorer may see; without it they are refused.
    PromptError names the file, the line or row, and the column.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"limit = {limit} keeps no prompt. Give 1 or more, or leave it out to keep them all.")
    pass_columns = (pass_columns,) if isinstance(pass_columns, str) else pass_columns
    name, rows = rows_of(source, split, column)
    prompts: dict[str, Prompt] = {}
    duplicates: list[str] = []
    seen: set[str] = set()
    note_counts: Counter[str] = Counter()
    for where, row in rows:
        if isinstance(row, PromptError):
            raise row
        prompt, used = _prompt(row, where, column, pass_columns)
        seen |= row.keys()
        if limit is not None and len(prompts) == limit:
            continue  # what follows is checked, and left
        if prompt.id in prompts:
            duplicates.append(where)
        else:
            prompts[prompt.id] = prompt
            note_counts.update(used)
    if not prompts:
        raise PromptError(f"{name} holds no prompt.")
    for wanted in pass_columns:
        if wanted not in seen:
            raise PromptError(f"{name}: pass_columns names {wanted!r}, which no row has.{nearest(wanted, seen)}")
    notes = [f"{what} in {count} of them" for what, count in note_counts.items()]
    return PromptSet.of(list(prompts.values()), name, duplicates, notes)


def _prompt(row: Mapping[str, Any], where: str, column: str, passed: Sequence[str]) -> tuple[Prompt, list[str]]:
    """(the prompt, what other columns became part of it)."""
    if column not in row:
        raise PromptError(_no_column(row, where, column))
    columns = {key: value for key, value in row.items() if key != column}
    if "set_id" in columns and "outputs" in columns:
        raise PromptError(
            f"{where}: an output set, with what a model wrote for the prompt. Its outputs are there to be judged, and "
            "are no part of the input-only data set; train on the prompts file that they were sampled from."
        )
    if not _is_empty(columns.get("prompt")):
        raise PromptError(f"{where}: there is a column 'prompt' beside {column!r}, which is the prompt; rename it.")
    for key, value in columns.items():
        if key in SCORER_ARGUMENTS:
            raise PromptError(f"{where}: the column {key!r} has the name of a scorer's argument; rename it.")
        if is_target(key) and key not in passed and not _is_empty(value):
            raise PromptError(
                f"{where}: the column {key!r} looks like a target, and policy learning takes inputs only. If the "
                f'scorer may see it: pass_columns = ["{key}"]. Else remove the column.'
            )
    content, used = _with_input(read_content(row[column], where, column), columns, where, column)
    content, more = _with_system(content, columns, where, column)
    return Prompt(content, columns, where), used + more


def _no_column(row: Mapping[str, Any], where: str, column: str) -> str:
    if {"chosen", "rejected"} <= row.keys():
        return (
            f"{where}: no column {column!r}, but chosen and rejected: this is a file of preferences, to learn from "
            "with `lossmith prefer` or `lossmith reward train`."
        )
    usual = next((name for name in USUAL if name in row), None)
    hint = "" if usual is None else f' Is it {usual!r}? prompt_column = "{usual}".'
    known = nearest(column, row) if row else " The row is empty."
    # A table without a header shows its first prompt as a column's name; that is not the name to give.
    header = " The first line of the file must name the columns." if _TABLE_LINE.search(where) else ""
    name = hint or " Name another with prompt_column (column in load_prompts)."
    return f"{where}: no column {column!r}.{known}{header}{name}"


def _with_input(content: Content, columns: Mapping[str, Any], where: str, column: str) -> tuple[Content, list[str]]:
    """Alpaca's rows: the `input` of an instruction is put below it, its `history` before, as in LLaMA-Factory."""
    if column not in ASKING:
        return content, []
    used = []
    extra: Any = columns.get("input")
    history: Any = columns.get("history")
    if not _is_empty(extra):
        if not isinstance(extra, str) or not isinstance(content, str):
            raise PromptError(f"{where}: the column 'input' belongs to {column!r}, and both must be text to be joined.")
        content = f"{content}\n{extra}"
        used.append(f"input joined to {column}")
    if not _is_empty(history):
        turns = history.tolist() if hasattr(history, "tolist") else history
        pairs = isinstance(turns, list | tuple) and all(isinstance(t, list | tuple) and len(t) == 2 for t in turns)
        if not pairs or not all(isinstance(text, str) for turn in turns for text in turn):
            raise PromptError(
                f"{where}: the column 'history' must hold a list of [question, answer], the turns before."
            )
        before = [
            {"role": role, "content": text} for t in turns for role, text in zip(("user", "assistant"), t, strict=True)
        ]
        now = ({"role": "user", "content": content},) if isinstance(content, str) else content
        content = (*before, *now)
        used.append("history as the turns before")
    return content, used


def _with_system(content: Content, columns: Mapping[str, Any], where: str, column: str) -> tuple[Content, list[str]]:
    """A `system` column beside the prompt is the system message."""
    for name in SYSTEM_COLUMNS:
        value = columns.get(name)
        if not isinstance(value, str) or is_blank(value):
            continue
        message = {"role": "system", "content": value}
        if isinstance(content, str):
            return (message, {"role": "user", "content": content}), [f"{name} as the system message"]
        if content[0] == message:
            return content, []
        if content[0]["role"] in ("system", "developer"):
            raise PromptError(
                f"{where}: {column!r} begins with another system message than the column {name!r} holds. Keep one."
            )
        return (message, *content), [f"{name} as the system message"]
    return content, []


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    missing = value is None or (isinstance(value, float) and value != value)  # pandas writes a missing text as NaN
    return missing or (isinstance(value, (list, tuple, dict)) and not value)

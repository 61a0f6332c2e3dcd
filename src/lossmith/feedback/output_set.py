"""Output sets: several outputs that a model wrote for one prompt, to be judged against each other.

A set is no training target: nothing in it was chosen by anyone yet. Everything is named by what it holds, so a
judgement can never be attached to another text than the one that was read. Columns of a prompt, which no annotator is
shown, are no part of a name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossmith.errors import FeedbackError, PromptError
from lossmith.files import at_home, read_text, write_atomically
from lossmith.policy import SamplingSettings
from lossmith.prompts import Prompt, load_prompts, plain, prompt_content
from lossmith.rollouts import Rollout

__all__ = [
    "Output",
    "OutputSet",
    "json_line",
    "named",
    "read_set",
    "read_sets",
    "set_of_rollouts",
    "write_rows",
    "write_sets",
]

_PROVENANCE = ("model", "policy_checksum", "policy_version", "temperature", "top_p", "top_k", "max_tokens", "seed")


@dataclass(frozen=True)
class Output:
    """One text for one prompt. `tokens` [T] and `behavior_logp` [T] are there when a policy of ours wrote it."""

    id: str  # 16 hex digits: of the prompt, the text, its tokens, and who wrote it
    text: str
    tokens: tuple[int, ...] | None = None
    behavior_logp: tuple[float, ...] | None = None
    finish_reason: str | None = None
    sample: int | None = None
    score: float | None = None  # where a scorer chose it; no annotator is shown it


@dataclass(frozen=True)
class OutputSet:
    """A prompt with its outputs, and how they were made (`provenance`: model, policy_version, temperature, ...)."""

    prompt: Prompt
    outputs: tuple[Output, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    near_duplicates: int = 0  # outputs that are nearly the same as another of the set, after resampling

    @property
    def id(self) -> str:
        """16 hex digits of what the set holds."""
        return _digest(self.prompt.content_id, *(output.id for output in self.outputs))

    def output(self, name: str) -> Output:
        return next(output for output in self.outputs if output.id == name)

    def as_row(self) -> dict[str, Any]:
        """The set's line in a sets file."""
        outputs = [
            {
                "id": o.id,
                "completion": o.text,
                **({} if o.sample is None else {"sample": o.sample}),
                **({} if o.score is None else {"score": o.score}),
                **({} if o.finish_reason is None else {"finish_reason": o.finish_reason}),
                **({} if o.tokens is None else {"tokens": list(o.tokens)}),
                **({} if o.behavior_logp is None else {"behavior_logp": list(o.behavior_logp)}),
            }
            for o in self.outputs
        ]
        columns = {"columns": plain(self.prompt.columns)} if self.prompt.columns else {}
        return {
            "set_id": self.id,
            "prompt": prompt_content(self.prompt),
            "prompt_id": self.prompt.id,
            **columns,
            "outputs": outputs,
            "near_duplicates": self.near_duplicates,
            **self.provenance,
        }


def named(
    prompt: Prompt, text: str, tokens: Sequence[int] | None = None, made: Mapping[str, Any] | None = None, **more: Any
) -> Output:
    """An output under its own name; `made` is the set's provenance."""
    ids = None if tokens is None else tuple(tokens)
    return Output(_digest(prompt.content_id, text, ids, sorted((made or {}).items())), text, ids, **more)


def set_of_rollouts(
    rollouts: Sequence[Rollout],
    model: str,
    settings: SamplingSettings,
    seed: int,
    checksum: str,
    *,
    near_duplicates: int = 0,
) -> OutputSet:
    """The rollouts of one prompt as a set; `checksum` is of the policy's weights."""
    made = {
        "model": model,
        "policy_checksum": checksum,
        "policy_version": rollouts[0].behavior_logp.distribution.policy_version,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "max_tokens": settings.max_tokens,
        "seed": seed,
    }
    outputs = tuple(
        named(
            r.prompt,
            r.completion,
            r.completion_ids,
            made | {"sample": r.sample},
            behavior_logp=tuple(round(x, 6) for x in r.behavior_logp.values.tolist()),
            finish_reason=r.finish_reason,
            sample=r.sample,
            score=r.score.value if r.score else None,
        )
        for r in rollouts
    )
    return OutputSet(rollouts[0].prompt, outputs, made, near_duplicates)


def write_sets(path: Path, sets: Iterable[OutputSet]) -> None:
    """One line a set; the file is whole or absent."""
    write_rows(path, (s.as_row() for s in sets))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file, whole or absent."""
    write_atomically(path, "".join(json_line(row) + "\n" for row in rows))


def json_line(row: Mapping[str, Any]) -> str:
    """Readable, but for half a surrogate pair (a completion may hold one), which no file can hold unescaped."""
    text = json.dumps(row, ensure_ascii=False)
    return text if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text) else json.dumps(row)


def read_sets(path: str | Path) -> list[OutputSet]:
    """The sets of a JSONL file, as `lossmith sample -o` writes it, or written by hand:
    {"prompt": ..., "outputs": ["text", "text", ...]}.

    FeedbackError names the file, the line and the field.
    """
    file = at_home(path, FeedbackError)
    if not file.exists():
        raise FeedbackError(f"there is no file of output sets {str(path)!r}. Make it with: lossmith sample -o {path}")
    text = read_text(file, FeedbackError, "file of output sets")
    sets: dict[str, OutputSet] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            output_set = read_set(line, f"{file.name}:{number}")
            sets.setdefault(output_set.id, output_set)  # the same set twice is one
    if not sets:
        raise FeedbackError(f"{path} holds no output set. Make some with: lossmith sample --n 4 -o {path}")
    return list(sets.values())


def read_set(line: str, where: str) -> OutputSet:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FeedbackError(f"{where}: not JSON: {error}. One set a line.") from None
    if not isinstance(row, dict) or not isinstance(row.get("outputs"), list):
        hint = ""
        if isinstance(row, dict) and "completion" in row:
            hint = " It holds one completion, not a set of them: sample again with --n 2 or more."
        raise FeedbackError(f'{where}: a set is {{"prompt": ..., "outputs": [...]}}.{hint}')
    columns = row.get("columns") or {}
    if not isinstance(columns, dict) or "prompt" in columns:
        raise FeedbackError(f"{where}: columns must be an object that names the prompt's columns, and not 'prompt'.")
    try:
        content = load_prompts([{"prompt": row.get("prompt", ""), **columns}], pass_columns=tuple(columns))[0]
    except PromptError as error:
        raise FeedbackError(f"{where}: {str(error).removeprefix('memory:1: ')}") from None
    prompt = Prompt(content.content, content.columns, where)
    made = {key: row[key] for key in _PROVENANCE if key in row}
    outputs = tuple(_read_output(o, prompt, made, f"{where}: output {k}") for k, o in enumerate(row["outputs"], 1))
    if len({o.id for o in outputs}) < len(outputs):
        raise FeedbackError(f"{where}: two outputs are the same; a set holds different ones.")
    near = row.get("near_duplicates", 0)
    if not isinstance(near, int) or near < 0:
        raise FeedbackError(f"{where}: near_duplicates = {near!r} is no number of outputs.")
    return OutputSet(prompt, outputs, made, near)


def _read_output(item: Any, prompt: Prompt, made: dict[str, Any], where: str) -> Output:
    row = {"completion": item} if isinstance(item, str) else item
    if not isinstance(row, Mapping) or not isinstance(row.get("completion"), str):
        raise FeedbackError(f'{where}: an output is text or {{"completion": text, ...}}, not {str(item)[:60]}.')
    tokens, logp = row.get("tokens"), row.get("behavior_logp")
    if tokens is not None and not (isinstance(tokens, list) and all(type(t) is int for t in tokens)):
        raise FeedbackError(f"{where}: tokens must be a list of token ids.")
    numbers = isinstance(logp, list) and all(isinstance(x, int | float) for x in logp)
    if logp is not None and not (numbers and tokens is not None and len(logp) == len(tokens)):
        raise FeedbackError(f"{where}: behavior_logp must hold one number for each of tokens.")
    sample = row.get("sample")
    ours = made if sample is None else made | {"sample": sample}
    output = named(
        prompt,
        row["completion"],
        tokens,
        ours,
        behavior_logp=None if logp is None else tuple(logp),
        finish_reason=row.get("finish_reason"),
        sample=sample,
        score=row.get("score"),
    )
    if "id" in row and row["id"] != output.id:
        raise FeedbackError(
            f"{where}: its text, tokens or settings were changed after it was written: the id {row['id']!r} belongs to "
            "another output. Judgements would be attached to a text that nobody read. Remove the id to make it a new "
            "output."
        )
    return output


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]

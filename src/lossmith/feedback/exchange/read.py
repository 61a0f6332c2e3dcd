"""Files of preferences, as others and we ourselves write them, become things said about texts.

| format         | a row                                                                                      |
|----------------|--------------------------------------------------------------------------------------------|
| `preferences`  | chosen and rejected, ranking, rating or label: the forms of `preferences.py`; the chats of  |
|                | LLaMA-Factory (`conversations` or `messages`, from and value) beside them                  |
| `label-studio` | a task of a JSON export (`foreign.py`)                                                      |
| `argilla`      | a record of an export (`foreign.py`)                                                        |
| `judgements`   | a set, or a judgement with all its fields: our own file, which loses nothing                |
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lossmith.errors import FeedbackError, PromptError
from lossmith.feedback.judgement import PAIR_VALUES, SCALES, Question
from lossmith.feedback.output_set import Output, named
from lossmith.feedback.preferences import Label, Pair, Ranking, Rating, parse_preference
from lossmith.prompts import Prompt, load_prompts, read_rows

__all__ = ["FORMATS", "Said", "format_of", "preference_row", "prompt_of", "read_file"]

FORMATS = ("preferences", "label-studio", "argilla", "judgements")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_MAY_BE_EMPTY = ("annotator", "probability", "margin", "weight", "low", "high")


@dataclass(frozen=True)
class Said:
    """One thing that a row says. `value` is as in a judgement: of a pair, about the first of `outputs`."""

    where: str
    prompt: Prompt
    kind: Question
    outputs: tuple[Output, ...]
    value: Any
    annotator: str = ""
    scale: str = ""  # of a rating; "" where the file does not say it
    seconds: float | None = None
    time: str = ""
    lost: tuple[str, ...] = ()  # fields of the row that a judgement does not have

    def __post_init__(self) -> None:
        assert self.kind in get_args(Question) and (self.kind != "pair" or _is_verdict(self.value)), self


def _is_verdict(value: Any) -> bool:
    return isinstance(value, float) or value in PAIR_VALUES


def read_file(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | FeedbackError]]:
    """(where, row) of each row, or what is wrong with it. FeedbackError: the file cannot be read at all."""
    if not path.is_file():
        raise FeedbackError(f"{path} is no file. Give a {', '.join(SUFFIXES)} file to import.")
    if path.suffix.lower() not in SUFFIXES:
        raise FeedbackError(f"{path}: files to import are {', '.join(SUFFIXES)}, not {path.suffix or 'no suffix'!r}.")
    if path.suffix.lower() == ".jsonl":
        yield from _lines(path)  # line by line, so that one bad line can be left out
        return
    table = path.suffix.lower() in (".csv", ".tsv")
    try:
        for where, row in read_rows(path):
            yield where, _cells(row) if table else row
    except PromptError as error:
        raise FeedbackError(str(error)) from None


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | FeedbackError]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FeedbackError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise FeedbackError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path.name}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, FeedbackError(f"{where}: not JSON: {error}. One object a line.")
            continue
        kind = type(row).__name__
        yield where, row if isinstance(row, dict) else FeedbackError(f"{where}: a row must be an object, not {kind}.")


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A CSV row with the lists that its cells hold; an empty cell of a field that need not be there is not there."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        optional = key in _MAY_BE_EMPTY or key.endswith(("_tokens", "_id"))
        if optional and value == "":
            continue
        lists = key.endswith("_tokens") or key == "ranking"
        found[key] = value
        if isinstance(value, str) and value.lstrip().startswith("[" if lists else "[{"):
            try:
                held = json.loads(value)
            except (ValueError, RecursionError):
                continue
            chat = all(isinstance(m, dict) and ({"role", "content"} <= m.keys() or "from" in m) for m in held)
            found[key] = held if lists or chat else value  # another list is a text that begins with a bracket
    return found


def format_of(row: Mapping[str, Any]) -> str:
    """Which of FORMATS a row is of."""
    if "set_id" in row and ("kind" in row or "outputs" in row):
        return "judgements"
    if isinstance(row.get("data"), Mapping) and "annotations" in row:
        return "label-studio"
    if isinstance(row.get("fields"), Mapping) and "responses" in row:
        return "argilla"
    return "preferences"


def prompt_of(content: Any, where: str) -> Prompt:
    try:
        checked = load_prompts([{"prompt": content}])[0]
    except PromptError as error:
        raise FeedbackError(f"{where}: {str(error).removeprefix('memory:1: ')}") from None
    return Prompt(checked.content, {}, where)


def preference_row(row: Mapping[str, Any], where: str) -> list[Said]:
    """What a row of preferences says."""
    p = parse_preference(_plain_chat(row, where), where)
    more: dict[str, Any] = {"annotator": p.annotator}
    if isinstance(p, Pair):
        value = {1.0: "first", 0.5: "tie"}.get(p.probability, p.probability)
        more["lost"] = ("margin",) * (p.margin != 0) + ("weight",) * (p.weight != 1)
        return [Said(where, p.prompt, "pair", (_own(p.prompt, p.chosen), _own(p.prompt, p.rejected)), value, **more)]
    if isinstance(p, Ranking):
        tiers = [[_own(p.prompt, o) for o in tier] for tier in p.tiers]
        outputs = tuple(o for tier in tiers for o in tier)
        return [Said(where, p.prompt, "ranking", outputs, [[o.id for o in tier] for tier in tiers], **more)]
    if isinstance(p, Label):
        return [Said(where, p.prompt, "rating", (_own(p.prompt, p.output),), int(p.good), scale="binary", **more)]
    value, scale = (int(p.rating) if p.rating.is_integer() else p.rating), _scale(p, where)
    return [Said(where, p.prompt, "rating", (_own(p.prompt, p.output),), value, scale=scale, **more)]


def _own(prompt: Prompt, output: Output) -> Output:
    """Under the name of what it holds: the name in the file is of an output whose settings the file does not have."""
    return named(prompt, output.text, output.tokens)


def _scale(rating: Rating, where: str) -> str:
    for name, ends in SCALES.items():
        if ends == (rating.low, rating.high):
            return name
    known = ", ".join(f"{low}-{high}" for low, high in SCALES.values())
    raise FeedbackError(
        f"{where}: low = {rating.low:g} and high = {rating.high:g} is no scale that is judged on: {known}. Stretching "
        "a scale would invent numbers that nobody said; bring the ratings to one of these."
    )


def _plain_chat(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """LLaMA-Factory's chats as prompt, chosen and rejected, or as prompt, completion and label; other rows as is."""
    field = next((name for name in ("conversations", "messages") if name in row), "")
    if not field or "prompt" in row:
        return row
    messages = _messages(row[field], where, field)
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": row["system"]}, *messages]
    rest = {key: value for key, value in row.items() if key not in (field, "system")}
    if "chosen" in row and "rejected" in row:
        ends = {side: _messages([row[side]], where, side)[0] for side in ("chosen", "rejected")}
        for side, message in ends.items():
            if message["role"] != "assistant":
                raise FeedbackError(f"{where}: {side} must be the assistant's message, not the {message['role']}'s.")
        return rest | {"prompt": messages} | {side: message["content"] for side, message in ends.items()}
    if messages[-1]["role"] != "assistant":
        raise FeedbackError(f"{where}: the last message of {field} must be the assistant's: it is what was judged.")
    return rest | {"prompt": messages[:-1], "completion": messages[-1]["content"]}


def _messages(value: Any, where: str, field: str) -> list[dict[str, str]]:
    """Chat messages, of which each has role and content, or from and value."""
    if not isinstance(value, list) or not value:
        raise FeedbackError(f"{where}: {field} must be a list of chat messages.")
    found = []
    for m in value:
        if isinstance(m, str) and field in ("chosen", "rejected"):
            m = {"role": "assistant", "content": m}
        role, text = (
            (m.get("role", m.get("from")), m.get("content", m.get("value"))) if isinstance(m, Mapping) else ("", 0)
        )
        if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
            raise FeedbackError(
                f"{where}: a message of {field} has role (or from) {', '.join(_ROLES)} and a text as content (or "
                f"value), not {str(m)[:80]}."
            )
        found.append({"role": _ROLES[role], "content": text})
    return found

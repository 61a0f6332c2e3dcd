"""Rows, as others and we ourselves write them, become statements about texts.

| format         | a row                                                                                      |
|----------------|--------------------------------------------------------------------------------------------|
| `preferences`  | chosen and rejected, ranking, rating or label, in our form or another tool's (`layouts.py`) |
| `label-studio` | a task of a JSON export (`foreign.py`)                                                      |
| `argilla`      | a record of an export (`foreign.py`)                                                        |
| `judgements`   | a set, or a judgement with all its fields: our own file, which loses nothing                |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from lossmith.errors import FeedbackError, PromptError
from lossmith.feedback.judgement import PAIR_VALUES, SCALES, Question
from lossmith.feedback.output_set import Output, named
from lossmith.feedback.preferences import Label, Pair, Preference, Ranking, Rating, parse_preferences
from lossmith.prompts import Prompt, load_prompts

__all__ = ["FORMATS", "Statement", "format_of", "preference_row", "prompt_of"]

FORMATS = ("preferences", "label-studio", "argilla", "judgements")


@dataclass(frozen=True)
class Statement:
    """One judgement that a row holds. `value` is as in a judgement: of a pair, about the first of `outputs`."""

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
        assert self.kind in get_args(Question), self
        assert self.kind != "pair" or isinstance(self.value, float) or self.value in PAIR_VALUES, self


def format_of(row: Mapping[str, Any]) -> str:
    """Which of FORMATS a row is of."""
    if "set_id" in row and ("kind" in row or "outputs" in row):
        return "judgements"
    if isinstance(row.get("data"), Mapping) and "annotations" in row:
        return "label-studio"
    if isinstance(row.get("fields"), Mapping):
        return "argilla"
    return "preferences"


def prompt_of(content: Any, where: str) -> Prompt:
    try:
        checked = load_prompts([{"prompt": content}])[0]
    except PromptError as error:
        raise FeedbackError(f"{where}: {str(error).removeprefix('memory:1: ')}") from None
    return Prompt(checked.content, {}, where)


def preference_row(row: Mapping[str, Any], where: str) -> tuple[list[Statement], set[str]]:
    """(what a row of preferences says, its columns that are not read)."""
    preferences, unread = parse_preferences(row, where)
    return [_statement(p, where) for p in preferences], unread


def _statement(p: Preference, where: str) -> Statement:
    more: dict[str, Any] = {"annotator": p.annotator}
    if isinstance(p, Pair):
        value = {1.0: "first", 0.5: "tie"}.get(p.probability, p.probability)
        more["lost"] = ("margin",) * (p.margin != 0) + ("weight",) * (p.weight != 1)
        return Statement(where, p.prompt, "pair", (_own(p.prompt, p.chosen), _own(p.prompt, p.rejected)), value, **more)
    if isinstance(p, Ranking):
        tiers = [[_own(p.prompt, o) for o in tier] for tier in p.tiers]
        outputs = tuple(o for tier in tiers for o in tier)
        return Statement(where, p.prompt, "ranking", outputs, [[o.id for o in tier] for tier in tiers], **more)
    if isinstance(p, Label):
        return Statement(where, p.prompt, "rating", (_own(p.prompt, p.output),), int(p.good), scale="binary", **more)
    value, scale = (int(p.rating) if p.rating.is_integer() else p.rating), _scale(p, where)
    return Statement(where, p.prompt, "rating", (_own(p.prompt, p.output),), value, scale=scale, **more)


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

"""Preferences: what judgements say about outputs, in the four forms that a loss can read, and their file.

| form       | a line of a preferences file                                                                    |
|------------|-------------------------------------------------------------------------------------------------|
| `Pair`     | {"prompt": ..., "chosen": text, "rejected": text, "probability": 1.0, "margin": 0.0}             |
| `Ranking`  | {"prompt": ..., "ranking": [[best, as good], [next], ...]}                                        |
| `Rating`   | {"prompt": ..., "completion": text, "rating": 4, "low": 1, "high": 5}                             |
| `Label`    | {"prompt": ..., "completion": text, "label": true}                                                |

The texts may also be chat messages (the last one is the assistant's). What other tools write is brought into these
forms by `layouts.py`.
`tokens` travel beside a text where a policy of ours wrote it: training then sees the tokens that were judged, not a
second tokenization of their text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lossmith.errors import FeedbackError, PromptError, nearest
from lossmith.feedback.layouts import FIELDS, our_rows
from lossmith.feedback.output_set import Output, named, write_rows
from lossmith.prompts import TEMPLATE_COLUMNS, Prompt, load_prompts, plain, prompt_content

__all__ = [
    "Label",
    "Pair",
    "Preference",
    "Ranking",
    "Rating",
    "form_of",
    "parse_preferences",
    "split_by_prompt",
    "write_preferences",
]

Form = Literal["pairs", "rankings", "ratings", "labels"]


@dataclass(frozen=True)
class Pair:
    """`chosen` was preferred to `rejected`, with probability 0.5 to 1 (0.5: a tie); weight 0 to 1 in a mean."""

    prompt: Prompt
    chosen: Output
    rejected: Output
    probability: float = 1.0
    margin: float = 0.0  # how much better, in units of the reward; 0 where nobody said
    weight: float = 1.0  # the pairs of one ranking share a weight of 1: they are one judgement
    annotator: str = ""

    def as_row(self) -> dict[str, Any]:
        # Every row has every field: a column with gaps breaks the trainers that read margins.
        numbers = {"probability": self.probability, "margin": self.margin, "weight": self.weight}
        texts = _text(self.prompt, "chosen", self.chosen) | _text(self.prompt, "rejected", self.rejected)
        return _row(self.prompt, self.annotator) | texts | numbers


@dataclass(frozen=True)
class Ranking:
    """Outputs in tiers, best first; those of one tier are as good as each other."""

    prompt: Prompt
    tiers: tuple[tuple[Output, ...], ...]
    annotator: str = ""

    def as_row(self) -> dict[str, Any]:
        row = _row(self.prompt, self.annotator) | {"ranking": [[o.text for o in tier] for tier in self.tiers]}
        if all(o.tokens is not None for tier in self.tiers for o in tier):
            row["ranking_tokens"] = [[list(o.tokens or ()) for o in tier] for tier in self.tiers]
        return row


@dataclass(frozen=True)
class Rating:
    """A number from `low` to `high` for one output."""

    prompt: Prompt
    output: Output
    rating: float
    low: float = 1.0
    high: float = 5.0
    annotator: str = ""

    def as_row(self) -> dict[str, Any]:
        scale = {"rating": self.rating, "low": self.low, "high": self.high}
        return _row(self.prompt, self.annotator) | _text(self.prompt, "completion", self.output) | scale


@dataclass(frozen=True)
class Label:
    """One output is good, or it is not."""

    prompt: Prompt
    output: Output
    good: bool
    annotator: str = ""

    def as_row(self) -> dict[str, Any]:
        return _row(self.prompt, self.annotator) | _text(self.prompt, "completion", self.output) | {"label": self.good}


Preference = Pair | Ranking | Rating | Label
_FORMS: dict[type, Form] = {Pair: "pairs", Ranking: "rankings", Rating: "ratings", Label: "labels"}


def form_of(preferences: Sequence[Preference], name: str = "the preferences") -> Form:
    """The one form that all have. FeedbackError where there are none, or several forms."""
    forms = sorted({_FORMS[type(p)] for p in preferences})
    if len(forms) != 1:
        what = f"hold {' and '.join(forms)} together; keep one form a file" if forms else "are none"
        raise FeedbackError(f"{name}: the preferences {what}.")
    return forms[0]


def split_by_prompt(
    preferences: Sequence[Preference], held_out: int | float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """(train, held out), every prompt on one side: pairs of one prompt are correlated, and would leak."""
    prompts = load_prompts([{"prompt": prompt_content(p.prompt)} for p in preferences])
    _, held_out_prompts = prompts.split(held_out, seed)
    ids = {prompt.content_id for prompt in held_out_prompts}
    train = [p for p in preferences if p.prompt.content_id not in ids]
    return train, [p for p in preferences if p.prompt.content_id in ids]


def write_preferences(path: Path, preferences: Iterable[Preference]) -> None:
    """One line a preference; the file is whole or absent."""
    write_rows(path, (p.as_row() for p in preferences))


def parse_preferences(row: Mapping[str, Any], where: str) -> tuple[list[Preference], set[str]]:
    """(what a row says, whichever tool wrote it; its columns that no preference has, which are not read).

    FeedbackError names the line and the field.
    """
    ours = our_rows(row, where)
    return [_parse(one, where) for one in ours], {str(key) for one in ours for key in one.keys() - FIELDS}


def _parse(row: Mapping[str, Any], where: str) -> Preference:
    """A row of our own form, in whichever of the four its fields say."""
    who = str(row.get("annotator") or "")
    if "chosen" in row and "rejected" in row:
        return _pair(row, where, who)
    prompt_row = row.get("prompt")
    if "ranking" in row:
        return _ranking(row, _prompt(prompt_row, where), where, who)
    if "completion" in row and ("rating" in row or "label" in row):
        prompt, text = _split_chat(prompt_row, row["completion"], where, "completion")
        output = _output(row, "completion", prompt, text, where)
        if "rating" in row:
            return _rating(row, prompt, output, where, who)
        return Label(prompt, output, _boolean(row["label"], where), who)
    if "outputs" in row:
        raise FeedbackError(
            f"{where}: a set of outputs that nobody has judged. Candidates are no training targets: annotate them "
            "first (lossmith annotate), and train on the judgements."
        )
    raise FeedbackError(
        f"{where}: a preference has chosen and rejected, or ranking, or completion with rating or label; this row has "
        f"{', '.join(row) or 'nothing'}.{nearest('chosen', row) if row else ''}"
    )


def _pair(row: Mapping[str, Any], where: str, who: str) -> Pair:
    prompt, chosen = _split_chat(row.get("prompt"), row["chosen"], where, "chosen")
    other, rejected = _split_chat(row.get("prompt"), row["rejected"], where, "rejected")
    if prompt.content_id != other.content_id:
        raise FeedbackError(
            f"{where}: chosen and rejected answer different prompts: they part before the last message. One answer of "
            "each is compared."
        )
    if chosen == rejected:
        raise FeedbackError(f"{where}: chosen and rejected are the same text: there is nothing to prefer.")
    return Pair(
        prompt,
        _output(row, "chosen", prompt, chosen, where),
        _output(row, "rejected", prompt, rejected, where),
        _number(row.get("probability", 1.0), where, "probability", 0.5, 1.0),
        _number(row.get("margin", 0.0), where, "margin", 0.0),
        _number(row.get("weight", 1.0), where, "weight", 0.0, 1.0),
        who,
    )


def _ranking(row: Mapping[str, Any], prompt: Prompt, where: str, who: str) -> Ranking:
    tiers = [tier if isinstance(tier, list) else [tier] for tier in _list(row["ranking"], where, "ranking")]
    tokens = row.get("ranking_tokens") or [[None] * len(tier) for tier in tiers]
    lists = isinstance(tokens, list) and all(isinstance(tier, list) for tier in tokens)
    if not lists or [len(tier) for tier in tokens] != [len(tier) for tier in tiers]:
        raise FeedbackError(f"{where}: ranking_tokens has not the shape of ranking.")
    for ids in (ids for tier in tokens for ids in tier if ids is not None):
        _check_ids(ids, where, "ranking_tokens")
    made = tuple(
        tuple(named(prompt, _plain(text, where, "ranking"), ids) for text, ids in zip(tier, its, strict=True))
        for tier, its in zip(tiers, tokens, strict=True)
    )
    names = [o.id for tier in made for o in tier]
    if len(names) < 2 or len(set(names)) < len(names):
        raise FeedbackError(f"{where}: a ranking orders two or more different texts.")
    return Ranking(prompt, made, who)


def _rating(row: Mapping[str, Any], prompt: Prompt, output: Output, where: str, who: str) -> Rating:
    low = _number(row.get("low", 1.0), where, "low")
    high = _number(row.get("high", 5.0), where, "high")
    if not low < high:
        raise FeedbackError(f"{where}: low = {low:g} is not below high = {high:g}.")
    return Rating(prompt, output, _number(row["rating"], where, "rating", low, high), low, high, who)


def _split_chat(prompt: Any, text: Any, where: str, field: str) -> tuple[Prompt, str]:
    """(prompt, the assistant's text). A text given as messages may repeat the prompt in front, or hold it alone."""
    if isinstance(text, str):
        return _prompt(prompt, where), text
    messages = _list(text, where, field)
    if not messages or not isinstance(messages[-1], Mapping) or messages[-1].get("role") != "assistant":
        raise FeedbackError(f"{where}: {field} must be text, or chat messages of which the last is the assistant's.")
    before = messages[:-1]
    if prompt in (None, "", []):
        prompt = before
    elif before and [dict(m) for m in _prompt(prompt, where).messages] != [
        {"role": m["role"], "content": m["content"]} for m in before
    ]:
        raise FeedbackError(f"{where}: the messages of {field} begin with another prompt than the field prompt.")
    return _prompt(prompt, where), _plain(messages[-1].get("content"), where, field)


def _prompt(content: Any, where: str) -> Prompt:
    if content is None or content == []:
        raise FeedbackError(
            f"{where}: the field prompt is missing, and the texts do not begin with the conversation that they end "
            "(chat messages, or turns of Human: and Assistant:). Add a column prompt."
        )
    try:
        checked = load_prompts([{"prompt": content}])[0]
    except PromptError as error:
        raise FeedbackError(f"{where}: {str(error).removeprefix('memory:1: ')}") from None
    return Prompt(checked.content, {}, where)


def _output(row: Mapping[str, Any], field: str, prompt: Prompt, text: str, where: str) -> Output:
    """The output of a field, under the name that it was judged by where the row says it."""
    tokens, name = row.get(f"{field}_tokens"), row.get(f"{field}_id")
    if tokens is not None:
        _check_ids(tokens, where, f"{field}_tokens")
    if not text.strip() and tokens is None and not name:
        raise FeedbackError(
            f"{where}: {field} is empty. A text that a model left empty has its tokens ({field}_tokens) or its name "
            f"({field}_id) beside it; without them it is taken for one that was lost."
        )
    output = named(prompt, text, tokens)
    return output if not name else dataclasses.replace(output, id=str(name))


def _check_ids(ids: Any, where: str, field: str) -> None:
    if not (isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)):
        raise FeedbackError(f"{where}: {field} must be a list of token ids.")


def _number(value: Any, where: str, field: str, low: float = -float("inf"), high: float = float("inf")) -> float:
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise FeedbackError(f"{where}: {field} = {value!r} is not a number.") from None
    if not low <= number <= high or number in (float("inf"), -float("inf")):  # the first also refuses NaN
        raise FeedbackError(f"{where}: {field} = {number:g} is not from {low:g} to {high:g}.")
    return number


def _boolean(value: Any, where: str) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    key = str(value).strip().lower()
    if key not in known:
        raise FeedbackError(f"{where}: label = {value!r} is neither true nor false.")
    return known[key]


def _list(value: Any, where: str, field: str) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a CSV cell
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise FeedbackError(f"{where}: {field} is not a JSON list.") from None
    if not isinstance(value, list | tuple):
        raise FeedbackError(f"{where}: {field} must be a list, not {type(value).__name__}.")
    return list(value)


def _plain(text: Any, where: str, field: str) -> str:
    if not isinstance(text, str):
        raise FeedbackError(f"{where}: {field} must hold text, not {type(text).__name__}.")
    return text


def _row(prompt: Prompt, annotator: str) -> dict[str, Any]:
    columns = {name: plain(prompt.columns[name]) for name in TEMPLATE_COLUMNS if name in prompt.columns}
    return {"prompt": prompt_content(prompt)} | columns | ({"annotator": annotator} if annotator else {})


def _text(prompt: Prompt, field: str, output: Output) -> dict[str, Any]:
    """The text; as a message where the prompt is messages, since TRL takes a row whose fields are all of one kind."""
    chat = not isinstance(prompt.content, str)
    text: Any = [{"role": "assistant", "content": output.text}] if chat else output.text
    tokens = {} if output.tokens is None else {f"{field}_tokens": list(output.tokens)}
    return {field: text, f"{field}_id": output.id} | tokens

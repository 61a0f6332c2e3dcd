"""Label Studio's and Argilla's exports. Neither says which field is what: names decide, and where they do not, the row
is refused or the answer left aside. Nothing is taken by its place in a list of fields."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lossmith.errors import FeedbackError
from lossmith.feedback.exchange.read import Statement, prompt_of
from lossmith.feedback.output_set import Output, named
from lossmith.prompts import Prompt

__all__ = ["argilla_row", "label_studio_row", "pick"]

_PROMPTS = ("prompt", "instruction", "question", "query", "input", "conversation", "messages", "dialogue", "text")
_GOOD = {"good", "yes", "up", "thumbsup", "positive", "true", "like", "accept", "accepted", "👍"}
_BAD = {"bad", "no", "down", "thumbsdown", "negative", "false", "dislike", "reject", "rejected", "👎"}
_TIES = {"tie", "equal", "equallygood", "same", "draw", "nopreference", "bothgood"}
_BOTH_BAD = {"bothbad", "botharebad"}


class _Item:
    """A task or record: its prompt, and the texts beside it by field."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        low = {str(key).lower(): key for key in fields}
        key = next((low[name] for name in _PROMPTS if name in low), None)
        if key is None:
            raise FeedbackError(
                f"{where}: no field is the prompt: {', '.join(map(str, fields)) or 'there are none'}. Name it "
                "prompt in the export."
            )
        self.where = where
        self.prompt: Prompt = prompt_of(fields[key], f"{where}: field {key}")
        self.fields = {str(k): v for k, v in fields.items() if isinstance(v, str) and k != key}

    def output(self, field: str) -> Output:
        return named(self.prompt, self.fields[field])

    def statement(self, kind: Any, texts: list[str], value: Any, who: Mapping[str, Any], **more: Any) -> Statement:
        outputs = tuple(named(self.prompt, text) for text in texts)
        if len({o.id for o in outputs}) < len(outputs):
            raise FeedbackError(f"{self.where}: two of the texts that were compared are the same.")
        return Statement(self.where, self.prompt, kind, outputs, value, **who, **more)

    def choice(self, choice: str, about: str | None, who: Mapping[str, Any]) -> Statement | None:
        """A label: one of two texts, a tie, both bad, or a thumb for the text that it is `about`; else None."""
        word = _squash(choice) or choice.strip()
        two = list(self.fields)
        if len(two) == 2:
            chosen = pick(choice, self.fields)
            texts = [self.fields[name] for name in two]
            verdict = "tie" if word in _TIES else "both_bad" if word in _BOTH_BAD else None
            if chosen is not None:
                verdict = "first" if chosen == two[0] else "second"
            if verdict is not None:
                return self.statement("pair", texts, verdict, who)
        if about is not None and word in _GOOD | _BAD:
            return self.statement("rating", [self.fields[about]], int(word in _GOOD), who, scale="binary")
        return None

    def order(self, tiers: list[list[str]], who: Mapping[str, Any], texts: Mapping[str, str]) -> Statement:
        """A ranking of names of texts."""
        keys = [[pick(name, texts) for name in tier] for tier in tiers]
        flat = [
            (key, name) for tier, names in zip(keys, tiers, strict=True) for key, name in zip(tier, names, strict=True)
        ]
        for key, name in flat:
            if key is None:
                raise FeedbackError(f"{self.where}: the ranking names {name!r}, but the texts are {', '.join(texts)}.")
        if len(flat) < 2:
            raise FeedbackError(f"{self.where}: a ranking orders two or more texts.")
        value = [[named(self.prompt, texts[str(key)]).id for key in tier] for tier in keys]
        return self.statement("ranking", [texts[str(key)] for key, _ in flat], value, who)


def pick(name: str, fields: Mapping[str, Any]) -> str | None:
    """The field that a name means: the same name, however it is punctuated, or else the only one with its end
    (txt-2 is text2, Response A is answer_a). None where no field or several could be meant."""
    for key in (str, _squash, _end):
        wanted = key(name)
        matches = [field for field in fields if wanted and key(field) == wanted]
        if len(matches) == 1:
            return matches[0]
        if matches:
            return None
    return None


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _end(name: str) -> str:
    match = re.search(r"(\d+|left|right|first|second|(?<![a-z])[a-z])\W*$", name.lower())
    return match.group(1) if match else ""


def _number(value: Any, where: str, what: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FeedbackError(f"{where}: {what} is {value!r}, not a number.")
    return int(value) if float(value).is_integer() else float(value)


# -- Label Studio -----------------------------------------------------------------------------------------------------


def label_studio_row(row: Mapping[str, Any], where: str, aside: Counter[str]) -> list[Statement]:
    """What the annotations of a task say; `aside` counts what is no judgement of outputs."""
    answers = list(_annotations(row, where, aside))
    if not answers:
        return []
    item = _Item(_mapping(row.get("data"), where, "data"), where)
    statements = []
    for result, who in answers:
        statement = _result(item, result, who, _mapping(row["data"], where, "data"))
        if statement is None:
            aside[f"answers of type {result.get('type')} ({result.get('from_name')}) that judge no output"] += 1
        else:
            statements.append(statement)
    return statements


def _annotations(
    row: Mapping[str, Any], where: str, aside: Counter[str]
) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    for annotation in _list(row.get("annotations"), where, "annotations"):
        annotation = _mapping(annotation, where, "annotations")
        if annotation.get("was_cancelled"):
            aside["skipped tasks"] += 1
            continue
        who = annotation.get("completed_by")
        if isinstance(who, Mapping):
            who = who.get("email") or who.get("id")
        seconds = annotation.get("lead_time")
        more = {
            "annotator": "" if who is None else str(who),
            "seconds": float(seconds) if isinstance(seconds, int | float) else None,
            "time": str(annotation.get("created_at") or ""),
        }
        for result in _list(annotation.get("result"), where, "annotations.result"):
            yield _mapping(result, where, "annotations.result"), more


def _result(item: _Item, result: Mapping[str, Any], who: dict[str, Any], data: Mapping[str, Any]) -> Statement | None:
    where, kind = item.where, result.get("type")
    value = _mapping(result.get("value"), where, "annotations.result.value")
    to = result.get("to_name") or ""
    names = [str(name).strip() for name in (to if isinstance(to, list) else str(to).split(","))]
    if kind == "pairwise":
        two = [pick(name, item.fields) for name in names]
        if len(two) != 2 or None in two or two[0] == two[1]:
            raise FeedbackError(
                f"{where}: to_name {','.join(names)!r} compares two texts, but it does not say which of data's fields "
                f"they are: {', '.join(item.fields)}. Name the fields of data like the tags."
            )
        verdict = {"left": "first", "right": "second", "tie": "tie"}.get(str(value.get("selected")))
        if verdict is None:
            raise FeedbackError(f"{where}: selected = {value.get('selected')!r} is neither left nor right.")
        return item.statement("pair", [item.fields[str(name)] for name in two], verdict, who)
    about = _about(names[0], item.fields)
    if kind == "rating":
        if about is None:
            raise FeedbackError(
                f"{where}: the rating's to_name {names[0]!r} is none of data's fields: {', '.join(item.fields)}."
            )
        return item.statement("rating", [item.fields[about]], _number(value.get("rating"), where, "rating"), who)
    if kind == "choices":
        choices = _list(value.get("choices"), where, "choices")
        return item.choice(str(choices[0]), about, who) if len(choices) == 1 else None
    return _ranker(item, value, who, data) if kind == "ranker" else None


def _about(name: str, fields: Mapping[str, str]) -> str | None:
    """The text that an answer is about; where there is one alone, that."""
    return next(iter(fields)) if len(fields) == 1 else pick(name, fields)


def _ranker(item: _Item, value: Mapping[str, Any], who: dict[str, Any], data: Mapping[str, Any]) -> Statement:
    """One list of ids, best first, of items that data holds as {"id": ..., "body" or another name: text}."""
    buckets = _mapping(value.get("ranker"), item.where, "ranker")
    filled = {str(name): ids for name, ids in buckets.items() if ids}
    if len(filled) != 1:
        raise FeedbackError(
            f"{item.where}: the ranker has {len(filled)} lists ({', '.join(filled)}), and nothing says which is the "
            "better one. One list, best first, can be imported."
        )
    ((_, ids),) = filled.items()
    texts = {}
    for entry in (entry for held in data.values() if isinstance(held, list) for entry in held):
        if isinstance(entry, Mapping) and "id" in entry:
            text = next((entry[k] for k in ("body", "text", "html", "title") if isinstance(entry.get(k), str)), None)
            if text is not None:
                texts[str(entry["id"])] = text
    if {str(i) for i in ids} != set(texts):
        raise FeedbackError(f"{item.where}: the ranker names {len(ids)} items, but data's lists hold {len(texts)}.")
    return item.order([[str(i)] for i in ids], who, texts)


# -- Argilla ----------------------------------------------------------------------------------------------------------


def argilla_row(row: Mapping[str, Any], where: str, aside: Counter[str]) -> list[Statement]:
    """What the responses of a record say: per question and user, in the layouts of Argilla 1 and 2."""
    answers = list(_responses(row, where, aside))
    if not answers:
        return []
    item = _Item(_mapping(row.get("fields"), where, "fields"), where)
    statements = []
    for question, value, user in answers:
        statement = _answer(item, question, value, {"annotator": user})
        if statement is None:
            aside[f"answers to {question!r} that judge no output"] += 1
        else:
            statements.append(statement)
    return statements


def _responses(row: Mapping[str, Any], where: str, aside: Counter[str]) -> Iterator[tuple[str, Any, str]]:
    """(question, value, user) of what was submitted."""
    responses = row.get("responses") or {}
    if not responses:
        aside["records without a response"] += 1
    flat: list[tuple[str, Any, Any, Any]] = []
    if isinstance(responses, Mapping):  # {question: [{"value": ..., "user_id": ...}]}
        for question, answers in responses.items():
            for one in (_mapping(one, where, "responses") for one in _list(answers, where, f"responses.{question}")):
                flat.append((str(question), one.get("value"), one.get("user_id"), one.get("status")))
    else:  # [{"user_id": ..., "values": {question: {"value": ...}}}]
        for one in (_mapping(one, where, "responses") for one in _list(responses, where, "responses")):
            for question, answers in _mapping(one.get("values") or {}, where, "responses.values").items():
                value = _mapping(answers, where, f"responses.values.{question}").get("value")
                flat.append((str(question), value, one.get("user_id"), one.get("status")))
    for question, value, user, status in flat:
        if status not in (None, "submitted"):
            aside[f"answers with the status {status}"] += 1
        elif value is not None:
            yield question, value, "" if user is None else str(user)


def _answer(item: _Item, question: str, value: Any, who: dict[str, Any]) -> Statement | None:
    where = f"{item.where}: question {question}"
    if isinstance(value, list):
        if value and all(isinstance(v, Mapping) and "value" in v for v in value):
            tiers: dict[Any, list[str]] = {}
            for v in sorted(value, key=lambda v: _number(v.get("rank"), where, "rank")):
                tiers.setdefault(v["rank"], []).append(str(v["value"]))
            return item.order(list(tiers.values()), who, item.fields)
        # A list of names is a ranking where they name texts, and else several labels.
        if len(value) > 1 and all(pick(str(v), item.fields) for v in value):
            return item.order([[str(v)] for v in value], who, item.fields)
        return None
    inside = [field for field in item.fields if _squash(field) in _squash(question)]
    about = max(inside, key=len) if inside else _about(question, item.fields)
    if isinstance(value, str):
        return item.choice(value, about, who)
    number = _number(value, where, "the answer")
    if about is None:
        raise FeedbackError(f"{where}: a rating of one of {', '.join(item.fields)}, and its name does not say which.")
    return item.statement("rating", [item.fields[about]], number, who)


def _mapping(value: Any, where: str, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise FeedbackError(f"{where}: {field} must be an object, not {type(value).__name__}.")
    return value


def _list(value: Any, where: str, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise FeedbackError(f"{where}: {field} must be a list, not {type(value).__name__}.")
    return value

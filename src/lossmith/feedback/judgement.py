"""A judgement: what somebody said about outputs, stored as it was said.

Nothing is thrown away and nothing is forced into a pair: a tie is a tie, "both bad" is that, a skip is a skip.
`convert.py` later makes preferences of judgements, which a loss can read.
"""

from __future__ import annotations

import datetime
import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from lossmith.errors import FeedbackError, nearest
from lossmith.feedback.output_set import OutputSet

__all__ = ["PAIR_VALUES", "SCALES", "SCHEMA", "Judgement", "Kind", "Question", "Source", "new_id", "now"]

SCHEMA = 1  # the version of this record; an older file is read, a newer one refused

Question = Literal["rating", "pair", "ranking"]
Kind = Literal["rating", "pair", "ranking", "skip", "flag", "undo"]
Source = Literal["person", "scorer", "model", "import"]  # never passed off as each other
SCALES: dict[str, tuple[int, int]] = {"1-5": (1, 5), "1-10": (1, 10), "binary": (0, 1)}
PAIR_VALUES = ("first", "second", "tie", "both_bad")


@dataclass(frozen=True)
class Judgement:
    """One answer of one annotator. `outputs` are ids, in the order in which they were shown.

    | kind      | outputs       | value                                                                          |
    |-----------|---------------|--------------------------------------------------------------------------------|
    | `rating`  | one           | a number on `scale`                                                            |
    | `pair`    | two           | "first", "second", "tie", "both_bad", or the probability that the first is better |
    | `ranking` | all of a set  | tiers of ids, best first: [["a"], ["b", "c"]]                                  |
    | `skip`    | those shown   | None; `question` says what was asked                                           |
    | `flag`    | those shown   | None; `comment` says what is wrong with the item                               |
    | `undo`    | none          | the id of the judgement taken back                                             |
    """

    set_id: str
    kind: Kind
    outputs: tuple[str, ...]
    value: Any
    annotator: str
    question: Question
    source: Source = "person"
    scale: str = ""  # of a rating: a key of SCALES
    comment: str = ""
    seconds: float | None = None  # from showing to answering
    page: str = ""  # version of the page, or of the annotator that is a program
    time: str = field(default_factory=lambda: now())  # UTC, ISO 8601
    id: str = field(default_factory=lambda: new_id())  # made by whoever asks, so that a click sent twice counts once
    schema: int = SCHEMA

    def check(self, of: OutputSet) -> Judgement:
        """Itself, if it makes sense about this set. FeedbackError says what does not."""
        if self.kind not in get_args(Kind) or self.question not in get_args(Question):
            raise FeedbackError(f"there is no judgement of kind {self.kind!r}.{nearest(self.kind, get_args(Kind))}")
        if self.source not in get_args(Source):
            raise FeedbackError(f"there is no source {self.source!r}.{nearest(self.source, get_args(Source))}")
        if not self.annotator.strip():
            raise FeedbackError("a judgement needs an annotator's name.")
        known = {output.id for output in of.outputs}
        strange = [name for name in self.outputs if name not in known]
        if strange or self.set_id != of.id:
            raise FeedbackError(
                f"the judgement is about {(strange or [self.set_id])[0]!r}, which is not in the set {of.id!r}: "
                "the sets file is another one than was judged."
            )
        if len(set(self.outputs)) < len(self.outputs):
            raise FeedbackError(f"a judgement of kind {self.kind} names the same output twice.")
        _CHECKS[self.kind](self, of)
        return self

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"outputs": list(self.outputs)}

    @classmethod
    def from_row(cls, row: Any, where: str = "judgement") -> Judgement:
        """FeedbackError: a field that is missing, unknown or of the wrong type, or a file of a newer version."""
        if not isinstance(row, Mapping):
            raise FeedbackError(f"{where}: a judgement is an object, not {type(row).__name__}.")
        schema = row.get("schema", SCHEMA)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise FeedbackError(
                f"{where}: written by a newer version of lossmith (schema {schema}; this one reads up to {SCHEMA}). "
                "Update lossmith."
            )
        known = cls.__dataclass_fields__
        for key in row:
            if key not in known:
                raise FeedbackError(f"{where}: a judgement has no field {key!r}.{nearest(key, known)}")
        for key in ("set_id", "kind", "outputs", "value", "annotator", "question"):
            if key not in row:
                raise FeedbackError(f"{where}: the field {key!r} is missing.")
        for key, kinds in _TYPES.items():
            if key in row and not isinstance(row[key], kinds):
                raise FeedbackError(f"{where}: {key} = {row[key]!r} is of the wrong type.")
        if not all(isinstance(name, str) for name in row["outputs"]):
            raise FeedbackError(f"{where}: outputs must name outputs by their ids.")
        if row["kind"] == "undo" and not isinstance(row["value"], str):
            raise FeedbackError(f"{where}: an undo names the judgement that it takes back.")
        return cls(**{**row, "outputs": tuple(row["outputs"]), "schema": SCHEMA})


_TYPES: dict[str, Any] = {
    "set_id": str, "kind": str, "outputs": list | tuple, "annotator": str, "question": str, "source": str,
    "scale": str, "comment": str, "seconds": int | float | None, "page": str, "time": str, "id": str,
}  # fmt: skip


def _rating(j: Judgement, of: OutputSet) -> None:
    _count(j, 1)
    if j.scale not in SCALES:
        raise FeedbackError(f"there is no scale {j.scale!r}.{nearest(j.scale, SCALES)}")
    low, high = SCALES[j.scale]
    # A scorer's number lies anywhere on the scale; a person clicks a whole one.
    whole = isinstance(j.value, int) and not isinstance(j.value, bool)
    number = whole or (isinstance(j.value, float) and math.isfinite(j.value) and j.source != "person")
    if not number or not low <= j.value <= high:
        raise FeedbackError(f"the rating {j.value!r} is not on the scale {j.scale}: {low} to {high}.")


def _pair(j: Judgement, of: OutputSet) -> None:
    _count(j, 2)
    soft = isinstance(j.value, float) and 0 <= j.value <= 1
    if not soft and j.value not in PAIR_VALUES:
        raise FeedbackError(f"a pair is judged {', '.join(PAIR_VALUES)} or a probability, not {j.value!r}.")


def _ranking(j: Judgement, of: OutputSet) -> None:
    tiers = j.value
    if not isinstance(tiers, list | tuple) or not all(isinstance(t, list | tuple) and t for t in tiers):
        raise FeedbackError(f"a ranking is a list of tiers, best first, not {json.dumps(tiers, default=str)[:60]}.")
    names = [name for tier in tiers for name in tier]
    missing = {o.id for o in of.outputs} - set(names)
    if missing:
        raise FeedbackError(f"the ranking misses {len(missing)} of {len(of.outputs)} outputs: {sorted(missing)[0]!r}.")
    if len(names) != len(of.outputs) or len(j.outputs) != len(of.outputs):
        raise FeedbackError("the ranking names an output twice, or one that the set does not hold.")


def _undo(j: Judgement, of: OutputSet) -> None:
    if not isinstance(j.value, str) or not j.value:
        raise FeedbackError("an undo names the judgement that it takes back.")


def _no_value(j: Judgement, of: OutputSet) -> None:
    if j.value is not None:
        raise FeedbackError(f"a {j.kind} has no value, but {j.value!r} was given.")


_CHECKS = {"rating": _rating, "pair": _pair, "ranking": _ranking, "undo": _undo, "skip": _no_value, "flag": _no_value}


def _count(j: Judgement, wanted: int) -> None:
    if len(j.outputs) != wanted:
        raise FeedbackError(f"a {j.kind} is about {wanted} output{'s' * (wanted > 1)}, not {len(j.outputs)}.")


def now() -> str:
    """UTC, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def new_id() -> str:
    return uuid.uuid4().hex

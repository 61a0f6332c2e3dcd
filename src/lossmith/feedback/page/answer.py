"""An answer: the fields of a form as a judgement, or the reason why it is none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lossmith.errors import FeedbackError
from lossmith.feedback.judgement import PAIR_VALUES, Judgement
from lossmith.feedback.page.work import Desk, Shown

__all__ = ["Refused", "read_answer", "undo_of"]


class Refused(Exception):
    """A request that gets a page with the reason. `again`: where and what to send, when that may help."""

    def __init__(self, status: int, title: str, text: str, again: tuple[str, Mapping[str, str]] | None = None) -> None:
        super().__init__(text)
        self.status, self.title, self.again = status, title, again


def read_answer(form: Mapping[str, str], shown: Shown, desk: Desk, version: str) -> Judgement:
    """Refused: an answer that makes no sense of its item."""
    kind = form.get("kind", desk.question)
    comment = form.get("comment", "").strip()
    if kind == "flag":
        comment = form.get("reason", "").strip() or comment
        if not comment:
            raise _unfit("Say in a few words what is wrong with it, then flag it.")
    try:
        judgement = Judgement(
            set_id=shown.item.set_id,
            kind=kind,  # type: ignore[arg-type]  # checked below
            outputs=shown.outputs,
            value=None if kind in ("skip", "flag") else _value(desk.question, form.get("value", "")),
            annotator=desk.annotator,
            question=desk.question,
            scale=desk.scale if kind == "rating" else "",
            comment=comment.encode("utf-8", "replace").decode(),
            seconds=shown.seconds(form.get("seconds", "")),
            page=version,
            id=shown.id,
        )
        if kind not in (desk.question, "skip", "flag"):
            raise FeedbackError(f"this page asks for a {desk.question}, not for {kind[:20]!r}.")
        return judgement.check(shown.item.of)
    except FeedbackError as error:
        raise _unfit(str(error)) from None


def undo_of(last: Judgement, version: str) -> Judgement:
    """Its id follows from what it takes back, so that it can be taken back only once."""
    name = hashlib.blake2b(f"undo {last.id}".encode(), digest_size=16).hexdigest()
    return Judgement(last.set_id, "undo", (), last.id, last.annotator, last.question, page=version, id=name)


def _value(question: str, text: str) -> Any:
    if question == "rating":
        try:
            return int(text.encode("ascii"))
        except ValueError:  # UnicodeEncodeError is one: other scripts' digits
            raise FeedbackError(f"a rating is a whole number, not {text[:20]!r}.") from None
    if question == "pair":
        if text not in PAIR_VALUES:
            raise FeedbackError(f"a pair is judged {', '.join(PAIR_VALUES)}, not {text[:20]!r}.")
        return text
    try:
        tiers = json.loads(text)
    except (ValueError, RecursionError):
        raise FeedbackError("a ranking is sent as JSON: a list of tiers, best first.") from None
    named = isinstance(tiers, list) and all(isinstance(t, list) and all(isinstance(n, str) for n in t) for t in tiers)
    if not named:
        raise FeedbackError("a ranking is a list of tiers of output ids, best first.")
    return tiers


def _unfit(text: str) -> Refused:
    return Refused(422, "That is not an answer", text)

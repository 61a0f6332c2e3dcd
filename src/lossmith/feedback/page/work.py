"""What an annotator is asked next: a pure function of the sets, the name, and the judgements so far.

Nothing is stored in the browser. A set's items follow each other, so that a prompt is read once; the order of the sets,
of a set's items and of the outputs shown differs from annotator to annotator and is the same on every visit.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lossmith.feedback.convert import effective_judgements
from lossmith.feedback.judgement import Judgement, Question, new_id
from lossmith.feedback.output_set import OutputSet

__all__ = ["Desk", "Item", "Shown", "items_of"]

Key = tuple[str, frozenset[str]]

_FEW = 6  # pairs of a set, or as many as it has outputs
_LONGEST = 3600.0  # seconds; who took longer was away, and how long the answer took is not known


@dataclass(frozen=True)
class Item:
    """One thing to judge: outputs of a set."""

    of: OutputSet
    set_id: str
    outputs: tuple[str, ...]

    @property
    def key(self) -> Key:
        return self.set_id, frozenset(self.outputs)

    def order_for(self, annotator: str) -> tuple[str, ...]:
        """The outputs as this annotator sees them: at random, and the same again after an undo."""
        return tuple(sorted(self.outputs, key=lambda name: _draw(annotator, self.set_id, *self.outputs, "", name)))


def items_of(sets: Iterable[OutputSet], question: Question) -> list[Item]:
    """Rating: each output. Ranking: each set of two or more. Pair: up to 6 pairs of a set, or one for each output."""
    items = []
    for of in sets:
        name = of.id
        ids = tuple(output.id for output in of.outputs)
        if question == "rating":
            items += [Item(of, name, (one,)) for one in ids]
        elif question == "ranking":
            items += [Item(of, name, ids)] if len(ids) > 1 else []
        else:
            items += [Item(of, name, pair) for pair in _pairs(name, ids)]
    return items


def _pairs(set_id: str, ids: Sequence[str]) -> list[tuple[str, str]]:
    """The same for every annotator, so that they can agree or not. A ring first: it leaves no output out."""
    mixed = sorted(ids, key=lambda one: _draw(set_id, one))
    ring = [(a, b) for a, b in zip(mixed, mixed[1:] + mixed[:1], strict=True)]
    rest = sorted(itertools.combinations(mixed, 2), key=lambda pair: _draw(set_id, *pair))
    once = {frozenset(pair): pair for pair in [*ring, *rest] if pair[0] != pair[1]}
    place = {one: k for k, one in enumerate(ids)}
    few = list(once.values())[: max(_FEW, len(ids))]
    return [(a, b) if place[a] < place[b] else (b, a) for a, b in few]


def _draw(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()


@dataclass
class Shown:
    """An item on somebody's screen. The id of the answer is made here, so that an answer sent twice counts once."""

    item: Item
    outputs: tuple[str, ...]
    id: str = field(default_factory=new_id)
    since: float = field(default_factory=time.monotonic)

    def seconds(self, claimed: str = "") -> float | None:
        """From showing to now; less, if the browser says that the page was not looked at all the while."""
        passed = time.monotonic() - self.since
        try:
            looked = float(claimed)
        except ValueError:
            looked = passed
        seconds = looked if 0 < looked < passed else passed
        return round(seconds, 2) if seconds <= _LONGEST else None


class Desk:
    """One annotator's work: what was answered, what is shown, what can be undone. `lock` guards a request's use."""

    def __init__(
        self, annotator: str, items: Sequence[Item], judged: Iterable[Judgement], question: Question, scale: str
    ) -> None:
        self.annotator, self.question, self.scale = annotator, question, scale
        self.items = {
            item.key: item
            for item in sorted(items, key=lambda i: (_draw(annotator, i.set_id), _draw(annotator, *i.outputs, "")))
        }
        self.judged = [j for j in judged if self._mine(j)]
        self.lock = threading.RLock()
        self._shown: dict[Key, Shown] = {}
        self._front: Key | None = None

    def _mine(self, j: Judgement) -> bool:
        """By this person, about an item of this page; a rating on another scale does not answer it."""
        if j.source != "person" or j.annotator != self.annotator or j.question != self.question:
            return False
        return j.kind == "undo" or (_key(j) in self.items and (j.kind != "rating" or j.scale == self.scale))

    def record(self, j: Judgement) -> None:
        """A judgement that is in the store now."""
        self.judged.append(j)
        if j.kind != "undo":
            self._shown.pop(_key(j), None)
        self._front = None

    def answers(self) -> dict[Key, Judgement]:
        """The answers that hold, by item, the latest last."""
        return {_key(j): j for j in effective_judgements(self.judged)}

    def last(self) -> Judgement | None:
        """What an undo would take back."""
        return next(reversed(self.answers().values()), None)

    def judgement(self, name: str) -> Judgement | None:
        return next((j for j in reversed(self.judged) if j.id == name), None)

    def next(self) -> Shown | None:
        """What was undone last, else the first item without an answer. None: all is done."""
        answered = self.answers()
        by_id = {j.id: _key(j) for j in self.judged if j.kind != "undo"}
        undone = (by_id.get(j.value) for j in reversed(self.judged) if j.kind == "undo")
        waiting = itertools.chain((key for key in undone if key is not None), self.items)
        key = next((key for key in waiting if key not in answered), None)
        if key is None:
            return None
        item = self.items[key]
        shown = self._shown.setdefault(key, Shown(item, item.order_for(self.annotator)))
        if key != self._front:  # not a mere reload
            shown.since, self._front = time.monotonic(), key
        return shown

    def shown(self, name: str) -> Shown | None:
        return next((shown for shown in self._shown.values() if shown.id == name), None)


def _key(j: Judgement) -> Key:
    return j.set_id, frozenset(j.outputs)

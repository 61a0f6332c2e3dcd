"""From judgements to preferences: pure functions, nothing guessed, everything left out counted.

An annotator's later answer to the same question replaces the earlier one. Different annotators are never averaged
here: they may disagree, and that is information (a pair judged both ways is two pairs).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lossmith.errors import FeedbackError, nearest
from lossmith.feedback.judgement import SCALES, Judgement
from lossmith.feedback.output_set import Output, OutputSet
from lossmith.feedback.preferences import Label, Pair, Preference, Ranking, Rating

__all__ = ["Converted", "convert", "effective_judgements", "to_labels", "to_pairs", "to_rankings", "to_ratings"]

Sets = Mapping[str, OutputSet]


@dataclass(frozen=True)
class Converted:
    """Preferences of one form, and how many judgements gave none, by reason."""

    preferences: list[Preference]
    left_out: dict[str, int] = field(default_factory=dict)

    def report(self) -> str:
        text = f"{len(self.preferences)} preferences"
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        return text + (f"; left out: {reasons}" if reasons else "")


def effective_judgements(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Those that still hold: without what was undone or answered again, and without the undos themselves."""
    undone = {(j.annotator, j.value) for j in judgements if j.kind == "undo"}  # nobody takes back another's
    latest: dict[tuple[Any, ...], Judgement] = {}
    for j in judgements:
        if j.kind != "undo" and (j.annotator, j.id) not in undone:
            latest.pop(_question_key(j), None)  # so that the order is that of the answers that hold
            latest[_question_key(j)] = j
    return list(latest.values())


def _question_key(j: Judgement) -> tuple[Any, ...]:
    """Who was asked what: the same key twice is an answer changed. A flag does not replace an answer."""
    return j.annotator, j.source, j.set_id, j.question, j.kind == "flag", frozenset(j.outputs)


def convert(form: str, judgements: Sequence[Judgement], sets: Sets, **options: Any) -> Converted:
    """`form` is pairs, rankings, ratings or labels."""
    if form not in _CONVERSIONS:
        raise FeedbackError(f"there is no form of preferences {form!r}.{nearest(form, _CONVERSIONS)}")
    return _CONVERSIONS[form](judgements, sets, **options)


def to_pairs(judgements: Sequence[Judgement], sets: Sets, *, ties: bool = False) -> Converted:
    """Pairs as they were judged, and those that rankings and ratings of one annotator imply.

    A ranking's pairs share one judgement's weight of 1, and so do the pairs of one annotator's ratings of a set. Ties
    are left out, or with `ties` kept as pairs with probability 0.5. "Both bad" is never a pair.
    """
    pairs: list[Preference] = []
    left: Counter[str] = Counter()
    rated: dict[tuple[str, ...], list[Judgement]] = {}
    for j in _checked_judgements(judgements, sets):
        if j.kind == "pair":
            _one_pair(j, sets[j.set_id], ties, pairs, left)
        elif j.kind == "ranking":
            levels = {name: -float(k) for k, tier in enumerate(j.value) for name in tier}
            _all_pairs(levels, j, sets[j.set_id], ties, 0.0, pairs, left)
        elif j.kind == "rating":
            rated.setdefault((j.annotator, j.source, j.set_id, j.scale), []).append(j)
        else:
            left[_PLURAL[j.kind]] += 1
    for (*_, set_id, scale), ratings in rated.items():
        if len(ratings) == 1:
            left["ratings with no other of the same set and annotator"] += 1
        low, high = SCALES[scale]
        levels = {j.outputs[0]: float(j.value) for j in ratings}
        _all_pairs(levels, ratings[0], sets[set_id], ties, 1 / (high - low), pairs, left)
    return Converted(pairs, dict(+left))


def _checked_judgements(judgements: Sequence[Judgement], sets: Sets) -> list[Judgement]:
    """Those that still hold. FeedbackError: one that does not fit its set, because a file was damaged."""
    effective = effective_judgements(judgements)
    for j in effective:
        if j.set_id not in sets:
            raise FeedbackError(
                f"the judgement {j.id!r} is about the set {j.set_id!r}, which is not among the sets given."
            )
        j.check(sets[j.set_id])
    return effective


def _one_pair(j: Judgement, of: OutputSet, ties: bool, pairs: list[Preference], left: Counter[str]) -> None:
    if j.value == "both_bad":
        left["judged both bad"] += 1
        return
    first, second = (of.output(name) for name in j.outputs)
    p = {"first": 1.0, "second": 0.0, "tie": 0.5}[j.value] if isinstance(j.value, str) else float(j.value)
    if p == 0.5 and not ties:
        left["ties"] += 1
    elif p >= 0.5:
        pairs.append(Pair(of.prompt, first, second, p, annotator=j.annotator))
    else:
        pairs.append(Pair(of.prompt, second, first, 1 - p, annotator=j.annotator))


def _all_pairs(
    levels: Mapping[str, float],
    j: Judgement,
    of: OutputSet,
    ties: bool,
    unit: float,
    pairs: list[Preference],
    left: Counter[str],
) -> None:
    """Pairs of outputs at different levels; `unit` turns a difference of levels into a margin, 0 for none."""
    names = [o.id for o in of.outputs if o.id in levels]
    made = [sorted(two, key=lambda name: -levels[name]) for two in itertools.combinations(names, 2)]
    decided = [(a, b) for a, b in made if ties or levels[a] != levels[b]]
    left["ties"] += len(made) - len(decided)
    for a, b in decided:
        gap = levels[a] - levels[b]
        p = 1.0 if gap else 0.5
        pair = Pair(of.prompt, of.output(a), of.output(b), p, gap * unit, 1 / len(decided), j.annotator)
        pairs.append(pair)


def to_rankings(judgements: Sequence[Judgement], sets: Sets) -> Converted:
    """Rankings as they were judged; a pair is a ranking of two; one annotator's ratings of a set are a ranking.

    A ranking in which all outputs are equal says nothing, and is left out.
    """
    rankings: list[Preference] = []
    left: Counter[str] = Counter()
    rated: dict[tuple[str, ...], list[Judgement]] = {}
    for j in _checked_judgements(judgements, sets):
        of = sets[j.set_id]
        if j.kind == "ranking" and len(j.value) > 1:
            rankings.append(Ranking(of.prompt, tuple(tuple(of.output(n) for n in t) for t in j.value), j.annotator))
        elif j.kind == "pair" and j.value in ("first", "second"):
            best_first = j.outputs if j.value == "first" else j.outputs[::-1]
            rankings.append(Ranking(of.prompt, tuple((of.output(n),) for n in best_first), j.annotator))
        elif j.kind == "rating":
            rated.setdefault((j.annotator, j.source, j.set_id, j.scale), []).append(j)
        else:
            left[_reason(j)] += 1
    for (annotator, _, set_id, _), ratings in rated.items():
        of = sets[set_id]
        tiers: dict[float, list[Output]] = {}
        for j in sorted(ratings, key=lambda j: -j.value):
            tiers.setdefault(j.value, []).append(of.output(j.outputs[0]))
        if len(tiers) > 1:
            rankings.append(Ranking(of.prompt, tuple(map(tuple, tiers.values())), annotator))
        elif len(ratings) == 1:
            left["ratings with no other of the same set and annotator"] += 1
        else:
            left["sets whose ratings are all equal"] += 1
    return Converted(rankings, dict(+left))


def to_ratings(judgements: Sequence[Judgement], sets: Sets) -> Converted:
    """Ratings as they were judged; nothing else is one."""
    ratings: list[Preference] = []
    left: Counter[str] = Counter()
    for j in _checked_judgements(judgements, sets):
        if j.kind != "rating":
            left[_PLURAL[j.kind]] += 1
            continue
        of, (low, high) = sets[j.set_id], SCALES[j.scale]
        ratings.append(Rating(of.prompt, of.output(j.outputs[0]), float(j.value), low, high, j.annotator))
    return Converted(ratings, dict(+left))


def to_labels(judgements: Sequence[Judgement], sets: Sets) -> Converted:
    """Thumbs: a rating in the upper or lower half of its scale (the middle says neither); "both bad" is two downs."""
    labels: list[Preference] = []
    left: Counter[str] = Counter()
    for j in _checked_judgements(judgements, sets):
        of = sets[j.set_id]
        if j.kind == "rating":
            low, high = SCALES[j.scale]
            middle = (low + high) / 2
            if j.value == middle:
                left["ratings in the middle of the scale"] += 1
            else:
                labels.append(Label(of.prompt, of.output(j.outputs[0]), j.value > middle, j.annotator))
        elif j.kind == "pair" and j.value == "both_bad":
            labels += [Label(of.prompt, of.output(name), False, j.annotator) for name in j.outputs]
        else:
            left[_reason(j)] += 1
    return Converted(labels, dict(+left))


_CONVERSIONS: dict[str, Any] = {
    "pairs": to_pairs,
    "rankings": to_rankings,
    "ratings": to_ratings,
    "labels": to_labels,
}
_PLURAL = {"rating": "ratings", "pair": "pairs", "ranking": "rankings", "skip": "skips", "flag": "flags"}


def _reason(j: Judgement) -> str:
    if j.kind == "pair":
        return {"tie": "ties", "both_bad": "judged both bad"}.get(str(j.value), "pairs")
    if j.kind == "ranking" and len(j.value) < 2:
        return "rankings in which all are equal"
    return _PLURAL[j.kind]

"""Import: the judgements of a file into a store, all or none, with a report of what was in it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from lossmith.errors import FeedbackError, nearest
from lossmith.feedback.convert import effective_judgements
from lossmith.feedback.exchange.foreign import argilla_row, label_studio_row
from lossmith.feedback.exchange.read import FORMATS, Statement, format_of, preference_row
from lossmith.feedback.judgement import SCALES, Judgement, Source, now
from lossmith.feedback.output_set import Output, OutputSet, read_set
from lossmith.feedback.rows import is_database, listed, read_file, refuse
from lossmith.feedback.store import Store
from lossmith.files import at_home

__all__ = ["import_file"]

Rows = list[tuple[str, Mapping[str, Any]]]
_FLIPPED = {"first": "second", "second": "first"}


def import_file(
    store: Store,
    path: str | Path,
    *,
    format: str = "auto",
    annotator: str | None = None,
    skip_bad: bool = False,
) -> str:
    """Put the judgements of a file, and the texts they are about, into the store. Returns a report of it.

    path: a file of rows, or another judgement database. format: auto, or one of `FORMATS`. annotator: who judged,
    where the file does not say it. skip_bad: leave out the rows that cannot be read; without it one such row keeps the
    whole file out. The same file again adds nothing.
    """
    if format not in ("auto", *FORMATS):
        raise FeedbackError(f"there is no format {format!r} to import.{nearest(format, ('auto', *FORMATS))}")
    path = at_home(path, FeedbackError)
    bad: list[FeedbackError] = []
    rows: Rows = []
    all_rows = _rows_of_database(path, store, bad) if is_database(path) else read_file(path)
    for where, row in all_rows:
        if isinstance(row, FeedbackError):
            bad.append(row)
        else:
            rows.append((where, row))
    formats = Counter(format_of(row) for _, row in rows).most_common(1)
    kind = format if format != "auto" else formats[0][0] if formats else "preferences"
    notes: Counter[str] = Counter()
    if kind == "judgements":
        sets, judgements = _own_file(rows, store, bad)
    else:
        statements = _statements(rows, kind, bad, notes)
        sets, judgements = _sets_and_judgements(statements, annotator or "import", bad)
    if bad and not skip_bad:
        raise refuse(path.name, bad)
    if not judgements and not sets:
        lines = "".join(f"\n  {count} {what}" for what, count in sorted(notes.items()))
        raise FeedbackError(
            f"{path.name} holds no judgement that can be read as {kind}.{lines}\n{listed(bad)}".rstrip()
        )
    store.add_sets(sets.values())
    new = store.add(judgements, store.sets())
    return _report(path, kind, judgements, new, bad, notes, store)


def _rows_of_database(path: Path, store: Store, bad: list[FeedbackError]) -> Rows:
    """Sets and judgements of another judgement file."""
    if path.absolute() == store.path.absolute():
        raise FeedbackError(f"{path} is the judgement file itself; give another to bring in.")
    with Store(path, create=False) as other:
        contents: list[Any] = [*other.sets(bad).values(), *other.judgements(bad=bad)]
    return [(f"{path.name}: {number}", one.as_row()) for number, one in enumerate(contents, 1)]


# -- what others wrote ------------------------------------------------------------------------------------------------


def _statements(rows: Rows, kind: str, bad: list[FeedbackError], notes: Counter[str]) -> list[Statement]:
    statements: list[Statement] = []
    unread: set[str] = set()
    for where, row in rows:
        try:
            if kind == "preferences":
                parsed, columns = preference_row(row, where)
                statements += parsed
                unread |= columns
            else:
                statements += (label_studio_row if kind == "label-studio" else argilla_row)(row, where, notes)
        except FeedbackError as error:
            bad.append(error)
    if unread:
        notes[f"columns not read, which no preference has: {', '.join(sorted(unread))}"] = len(unread)
    unscaled = [s.value for s in statements if s.kind == "rating" and not s.scale]
    if unscaled:  # an export of stars does not say how many there were
        most = max((value for value in unscaled if value <= SCALES["1-10"][1]), default=0)  # more is a bad row
        scale = "1-5" if most <= SCALES["1-5"][1] else "1-10"
        notes[f"ratings taken as {scale}: the export does not say its scale"] += len(unscaled)
        statements = [s if s.scale or s.kind != "rating" else dataclasses.replace(s, scale=scale) for s in statements]
    for name in ("margin", "weight"):
        notes[f"values of {name} dropped: a judgement says which is better, not by how much"] += sum(
            name in s.lost for s in statements
        )
    return statements


def _sets_and_judgements(
    statements: Iterable[Statement], annotator: str, bad: list[FeedbackError]
) -> tuple[dict[str, OutputSet], list[Judgement]]:
    """Sets and judgements. Pairs and rankings have sets of their own; the ratings of a prompt share one, so that they
    can be compared."""
    statements = list(statements)
    rated: dict[str, dict[str, Output]] = {}
    for s in statements:
        if s.kind == "rating":
            rated.setdefault(s.prompt.content_id, {})[s.outputs[0].id] = s.outputs[0]
    sets: dict[str, OutputSet] = {}
    judgements = []
    for s in statements:
        outputs = rated[s.prompt.content_id].values() if s.kind == "rating" else s.outputs
        # In the order of their names, which is nobody's: the file's order is not one in which they were shown.
        of = OutputSet(s.prompt, tuple(sorted(outputs, key=lambda o: o.id)))
        names, value = tuple(o.id for o in s.outputs), s.value
        if s.kind == "pair" and names[0] > names[1]:
            names, value = names[::-1], 1 - value if isinstance(value, float) else _FLIPPED.get(value, value)
        elif s.kind == "ranking":
            names = tuple(o.id for o in of.outputs)
        who = s.annotator or annotator
        key = json.dumps([of.id, s.kind, names, value, who, s.scale])
        j = Judgement(
            of.id, s.kind, names, value, who, s.kind, "import", s.scale, "", s.seconds,
            time=s.time or now(), id=hashlib.sha256(key.encode()).hexdigest()[:32],
        )  # fmt: skip
        try:
            judgements.append(j.check(of))
            sets.setdefault(of.id, of)
        except FeedbackError as error:
            bad.append(FeedbackError(f"{s.where}: {error}"))
    return sets, judgements


# -- what we wrote ----------------------------------------------------------------------------------------------------


def _own_file(rows: Rows, store: Store, bad: list[FeedbackError]) -> tuple[dict[str, OutputSet], list[Judgement]]:
    """Sets and judgements as they were, under their own ids."""
    sets: dict[str, OutputSet] = {}
    judgement_rows: Rows = []
    for where, row in rows:
        if "kind" in row:
            judgement_rows.append((where, row))
            continue
        try:
            output_set = read_set(json.dumps(row, ensure_ascii=False), where)
            sets[output_set.id] = output_set
        except (ValueError, TypeError, AttributeError, OverflowError) as error:  # FeedbackError is a ValueError
            bad.append(_at(where, error))
    known = store.sets() | sets
    by_id = {j.id: j for j in store.judgements()}
    judgements = []
    for where, row in judgement_rows:
        try:
            j = _check_types(Judgement.from_row(row, where))
            if j.set_id not in known:
                raise FeedbackError(f"its set {j.set_id!r} is neither in the file nor in {store.path}.")
            j.check(known[j.set_id])
            if by_id.setdefault(j.id, j) != j:
                raise FeedbackError(f"the id {j.id!r} belongs to another judgement already.")
            judgements.append(j)
        except (FeedbackError, TypeError, AttributeError) as error:
            bad.append(_at(where, error))
    return sets, judgements


def _at(where: str, error: Exception) -> FeedbackError:
    return FeedbackError(str(error) if str(error).startswith(where) else f"{where}: {error}")


def _check_types(j: Judgement) -> Judgement:
    """Itself, if the fields that no set decides on are what they should be."""
    for name in ("set_id", "annotator", "kind", "question", "source", "scale", "comment", "page", "time", "id"):
        if not isinstance(getattr(j, name), str):
            raise FeedbackError(f"{name} must be text, not {getattr(j, name)!r}.")
    if j.source not in get_args(Source):
        raise FeedbackError(f"there is no source {j.source!r}.{nearest(j.source, get_args(Source))}")
    if not j.id:
        raise FeedbackError("the id is empty; without one, two judgements cannot be told apart.")
    if j.seconds is not None and not (isinstance(j.seconds, int | float) and math.isfinite(j.seconds)):
        raise FeedbackError(f"seconds must be a number, not {j.seconds!r}.")
    return j


# -- the report -------------------------------------------------------------------------------------------------------


def _report(
    path: Path, kind: str, judgements: list[Judgement], new: int, bad: list[FeedbackError], notes: Counter[str],
    store: Store,
) -> str:  # fmt: skip
    kinds = Counter(j.kind for j in judgements)
    what = ", ".join(f"{count} of kind {name}" for name, count in sorted(kinds.items()))
    lines = [
        f"{path.name} ({kind}): {len(judgements)} judgements read ({what})",
        f"imported: {new}",
        f"duplicates: {len(judgements) - new}",
        f"contradictory: {_contradictory(judgements, store)}",
        f"no signal: {_no_signal(judgements)}",
    ]
    unique = {j.id: j for j in judgements}.values()
    replaced = len([j for j in unique if j.kind != "undo"]) - len(effective_judgements(list(unique)))
    if replaced and kind != "judgements":
        lines.append(f"replaced: {replaced} answers by a later one of the same annotator to the same question")
    lines += [f"{count} {what}" for what, count in sorted((+notes).items())]
    if bad:
        lines.append(f"left out: {len(bad)} rows that cannot be read\n{listed(bad)}")
    return "\n".join(lines)


def _contradictory(judgements: list[Judgement], store: Store) -> str:
    """How many pairs of texts one annotator preferred both ways, in the file or together with what was there."""
    sets = store.sets()
    here = {key[:3] for j in judgements for key in _preferred(j, sets)}
    everything = store.judgements()
    undone = {j.value for j in everything if j.kind == "undo"}
    ways: dict[tuple[Any, ...], set[bool]] = {}
    for j in everything:
        if j.id not in undone:
            for who, prompt, two, way in _preferred(j, sets):
                ways.setdefault((who, prompt, two), set()).add(way)
    count = sum(len(ways.get(key, ())) > 1 for key in here)
    return f"{count} pairs of texts that one annotator preferred both ways; the later answer counts" if count else "0"


def _preferred(j: Judgement, sets: Mapping[str, OutputSet]) -> Iterable[tuple[str, str, tuple[str, ...], bool]]:
    """(annotator, prompt, the two texts, whether the first of them) of each preference that was said outright."""
    of = sets[j.set_id]
    tiers: list[list[str]] = []
    if j.kind == "ranking":
        tiers = j.value
    elif j.kind == "pair" and j.value not in ("tie", "both_bad", 0.5):
        first = j.value == "first" or (not isinstance(j.value, str) and j.value > 0.5)
        tiers = [[name] for name in (j.outputs if first else j.outputs[::-1])]
    for better, worse in itertools.combinations(tiers, 2):
        for a, b in itertools.product(better, worse):
            first, second = of.output(a).text, of.output(b).text
            yield j.annotator, of.prompt.content_id, (min(first, second), max(first, second)), first < second


def _no_signal(judgements: list[Judgement]) -> str:
    """Judgements that prefer nothing."""
    ratings = [j for j in judgements if j.kind == "rating"]
    if len(ratings) > 1 and len(ratings) == len(judgements) and len({j.value for j in ratings}) == 1:
        return f"all {len(ratings)} ratings are equal"
    ties = sum(
        (j.kind == "pair" and j.value in ("tie", "both_bad", 0.5)) or (j.kind == "ranking" and len(j.value) < 2)
        for j in judgements
    )
    groups: dict[tuple[str, str], list[Any]] = {}
    for j in ratings:
        groups.setdefault((j.set_id, j.annotator), []).append(j.value)
    flat = sum(len(values) > 1 and len(set(values)) == 1 for values in groups.values())
    parts = [f"{ties} ties"] * bool(ties) + [f"{flat} sets whose ratings are all equal"] * bool(flat)
    return ", ".join(parts) or "0"

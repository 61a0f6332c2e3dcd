"""Preferences from any file, database or list: one reader for everything that learns from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossmith.errors import FeedbackError
from lossmith.feedback.convert import convert
from lossmith.feedback.exchange.importing import import_file
from lossmith.feedback.exchange.read import format_of
from lossmith.feedback.judgement import Judgement
from lossmith.feedback.output_set import OutputSet
from lossmith.feedback.preferences import Form, Preference, form_of, parse_preferences
from lossmith.feedback.rows import is_database, listed, read_file, refuse
from lossmith.feedback.store import Store
from lossmith.files import at_home

__all__ = ["Gathered", "gather"]


@dataclass(frozen=True)
class Gathered:
    """Preferences of one form. `notes` say, a line each, what was left out and what was not read."""

    preferences: list[Preference]
    notes: list[str] = field(default_factory=list)


def gather(source: Any, form: Form | None = None, *, skip_bad: bool = False) -> Gathered:
    """The preferences of a file that any tool wrote, of a judgement database, or of a list (of them, or of rows).

    form: what judgements are turned into (pairs, rankings, ratings, labels); without it, what keeps most of them.
    skip_bad: leave out and count the rows that cannot be used, in place of a FeedbackError that names them.
    FeedbackError: also where nothing is left, or where several forms are mixed.
    """
    if isinstance(source, str | Path):
        path = at_home(source, FeedbackError)
        if is_database(path):
            return _from_database(path, form, skip_bad)
        name, rows = path.name, list(read_file(path))
        kinds = [format_of(row) for _, row in rows if isinstance(row, Mapping)]
        if any(kind != "preferences" for kind in kinds) and max(kinds, key=kinds.count) != "preferences":
            with Store(":memory:") as store:  # judgements as they were made, and not preferences yet
                notes = [import_file(store, path, skip_bad=skip_bad)]
                return _converted(str(source), store.judgements(), store.sets(), form, notes)
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise FeedbackError(
            f"preferences are a file, a judgement database, or a list of preferences, not {type(source).__name__}."
        )
    else:
        name, rows = "memory", [(f"memory:{k}", item) for k, item in enumerate(source, 1)]
    return _from_rows(name, rows, skip_bad)


def _from_rows(name: str, rows: list[tuple[str, Any]], skip_bad: bool) -> Gathered:
    """Preferences as they are, with what judgements cannot hold: margins, weights, tokens."""
    preferences: list[Preference] = []
    bad: list[FeedbackError] = []
    unread: set[str] = set()
    for where, row in rows:
        try:
            if isinstance(row, FeedbackError):
                raise row
            if isinstance(row, Preference):
                preferences.append(row)
            elif isinstance(row, Mapping):
                parsed, columns = parse_preferences(row, where)
                preferences += parsed
                unread |= columns
            else:
                raise FeedbackError(f"{where}: a preference is a row or a Pair, Ranking, Rating or Label, not {row!r}.")
        except FeedbackError as error:
            bad.append(error)
    if bad and not skip_bad:
        raise refuse(name, bad)
    if not preferences:
        raise FeedbackError(f"{name} holds no preference that can be used.\n{listed(bad)}".rstrip())
    form_of(preferences, name)
    notes = [f"{len(bad)} of {len(rows)} rows left out, which cannot be used:\n{listed(bad)}"] if bad else []
    notes += [f"columns not read, which no preference has: {', '.join(sorted(unread))}"] if unread else []
    return Gathered(preferences, notes)


def _from_database(path: Path, form: Form | None, skip_bad: bool) -> Gathered:
    """What was judged on our page, or imported into its file."""
    bad: list[FeedbackError] = []
    with Store(path, create=False) as store:
        judgements = store.judgements(bad=bad if skip_bad else None)
        sets = store.sets(bad if skip_bad else None)
    notes = [f"{len(bad)} damaged rows left out:\n{listed(bad)}"] if bad else []
    return _converted(str(path), [j for j in judgements if j.set_id in sets], sets, form, notes)


def _converted(
    name: str, judgements: list[Judgement], sets: Mapping[str, OutputSet], form: Form | None, notes: list[str]
) -> Gathered:
    kinds = {j.kind for j in judgements}
    best: Form = "rankings" if "ranking" in kinds else "pairs" if "pair" in kinds else "ratings"
    made = convert(form or best, judgements, sets)
    if not judgements:
        raise FeedbackError(
            f"{name} holds {len(sets)} sets of outputs that nobody has judged. Candidates are no training targets: "
            "annotate them first (lossmith annotate), and train on the judgements."
        )
    if not made.preferences:
        raise FeedbackError(
            f"{name}: none of the {len(judgements)} judgements makes one of the {form or best} ({made.report()}). "
            "Choose another form, or judge more."
        )
    left = ", ".join(f"{count} {why}" for why, count in sorted(made.left_out.items()))
    return Gathered(made.preferences, notes + ([f"judgements left out: {left}"] if left else []))

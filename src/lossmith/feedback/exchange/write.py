"""Export: judgements as preferences that a loss reads, or as they are."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lossmith.errors import FeedbackError, nearest
from lossmith.feedback.convert import Converted, convert, effective_judgements
from lossmith.feedback.judgement import Judgement
from lossmith.feedback.output_set import write_rows
from lossmith.feedback.preferences import Label, Pair, Preference, Rating, write_preferences
from lossmith.feedback.store import Store
from lossmith.files import check_writable, write_atomically

__all__ = ["FORMS", "export_file"]

FORMS = ("pairs", "rankings", "ratings", "labels", "judgements")


def export_file(store: Store, path: str | Path, *, form: str = "pairs", ties: bool = False) -> str:
    """Write the store's judgements in one of `FORMS`; returns what was written and what was left out.

    Preferences go to .jsonl or .csv; judgements to .jsonl, with the sets, so that `import_file` gives them back as they
    were. ties: ties as pairs of probability 0.5. FeedbackError: the file exists, or nothing can be learned.
    """
    if form not in FORMS:
        raise FeedbackError(f"there is no form {form!r} to export.{nearest(form, FORMS)}")
    if ties and form != "pairs":
        raise FeedbackError(f"ties are kept or left out of pairs; {form} have them anyway. Leave --ties out.")
    path = Path(path)
    suffixes = (".jsonl",) if form == "judgements" else (".jsonl", ".csv")
    if path.suffix.lower() not in suffixes:
        raise FeedbackError(f"{path}: {form} are written to {' and '.join(suffixes)} files.")
    path = check_writable(path, FeedbackError, new=True)
    judgements, sets = store.judgements(), store.sets()
    if form == "judgements":
        rows = [s.as_row() for s in sets.values()] + [j.as_row() for j in judgements]
        write_rows(path, rows)
        return f"{len(judgements)} judgements of {len(sets)} sets written to {path}"
    made = convert(form, judgements, sets, **({"ties": ties} if form == "pairs" else {}))
    if not made.preferences:
        raise FeedbackError(_why_none(form, effective_judgements(judgements), made))
    if path.suffix.lower() == ".csv":
        write_atomically(path, _table([p.as_row() for p in made.preferences]))
    else:
        write_preferences(path, made.preferences)
    left_out = made.report().partition("; ")[2]
    summary = f"{len(made.preferences)} {form} written to {path}" + (f"; {left_out}" if left_out else "")
    flat = _flat(made.preferences)
    return summary + (f"\nno signal: {flat}" if flat else "")


def _why_none(form: str, judgements: Sequence[Judgement], made: Converted) -> str:
    """Why no preference came of the judgements."""
    ratings = [j for j in judgements if j.kind == "rating"]
    if not judgements:
        return "there is no judgement to export. Annotate first: lossmith annotate SETS"
    if ratings and len(ratings) == len(judgements) and len({j.value for j in ratings}) == 1:
        return f"no signal: all {len(ratings)} ratings are equal. Nothing was written."
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(made.left_out.items()))
    return (
        f"no signal: {len(judgements)} judgements give no {form} ({left_out}). Nothing was written; choose another "
        "--form, or judge more."
    )


def _flat(preferences: Sequence[Preference]) -> str:
    """Why nothing can be learned from these preferences, where all are equal; or ""."""
    if all(isinstance(p, Pair) and p.probability == 0.5 for p in preferences):
        return f"all {len(preferences)} pairs are ties"
    if len(preferences) > 1 and len({p.rating for p in preferences if isinstance(p, Rating)}) == 1:
        return f"all {len(preferences)} ratings are equal"
    if len(preferences) > 1 and len({p.good for p in preferences if isinstance(p, Label)}) == 1:
        return f"all {len(preferences)} labels are equal"
    return ""


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """CSV; lists as JSON in their cell."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in row.items()})
    return out.getvalue()

"""The page: everything that was read, put into its template. Whatever came from a run is text, never markup."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lossmith import __version__
from lossmith.detectors import Place
from lossmith.detectors.series import in_steps
from lossmith.detectors.words import place_in_words
from lossmith.errors import RunError, printable
from lossmith.files import check_writable, write_atomically
from lossmith.report.page.completions import ROWS, pairs, shown
from lossmith.report.page.curves import COLORS, charts, dash
from lossmith.report.page.family import Family, differences, families
from lossmith.report.page.folder import RunSeen, read_runs, short
from lossmith.report.page.formula import mathml
from lossmith.report.page.speed import phases
from lossmith.report.page.story import about_all, about_run, figure, spread
from lossmith.templates import templates_of

__all__ = ["write_report"]

_LONGEST = 1500  # characters of a completion in the table; in rollouts/ it is whole
_FIRST_PAIRS = 4  # held-out prompts that are shown open


def write_report(runs: str | Path | Sequence[str | Path], output: str | Path = "report.html") -> Path:
    """Write one HTML file about a run folder or several; returns its place.

    It holds all that it shows and asks no network: drawings, formulas, completions. The runs may be finished, dead or
    under way, and none of their code is executed. Runs whose recipes differ in the seed alone are drawn as their mean
    and range. RunError: a folder is no run, or the file cannot be written.
    """
    given = [runs] if isinstance(runs, str | Path) else list(runs)
    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise RunError(f"{str(output)!r}: a report is an .html file.")
    target = check_writable(output)
    write_atomically(target, _page(read_runs(given)))
    return target


def _page(runs: list[RunSeen]) -> str:
    groups = families(runs)
    drawn, absent = charts(groups)
    found = [shown(run, ROWS // len(runs)) for run in runs]
    style, script = (
        files("lossmith.report.page").joinpath("templates", f"page.{x}").read_text("utf-8") for x in ("css", "js")
    )
    environment = templates_of("lossmith.report.page")
    environment.filters |= {"text": _text, "cell": _cell, "figure": figure, "spread": spread, "short": short}
    told = [_told(run) for run in runs]  # reads the held-out files, which may add notes
    return environment.get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        runs=runs,
        told=told,
        families=[_family(f) for f in groups],
        overview=about_all(runs, groups),
        charts=[(c, Markup(c.svg)) for c in drawn],
        absent=absent,
        found=found,
        differing=differences(runs),
        rows=[row for one in found for row in one.table],
        first_pairs=_FIRST_PAIRS,
    )


def _told(run: RunSeen) -> dict[str, Any]:
    """What the template says of a run, read from it once."""
    both = pairs(run)
    loss = run.loss
    first = [p for i, p in enumerate(both) if i < _FIRST_PAIRS or p.said]
    return {
        "story": about_run(run),
        "facts": _facts(run),
        "formula": [Markup(line) for line in mathml(loss)] if loss is not None else [],
        "formula_text": str(loss) if loss is not None else str(run.summary.get("loss", "")),
        "paper": loss.paper if loss is not None and hasattr(loss, "paper") else "",
        "pairs": first,
        "more_pairs": [p for p in both if p not in first],
        "phases": phases(run),
        "findings": [_finding(f) for f in run.findings],
    }


def _facts(run: RunSeen) -> list[tuple[str, str]]:
    """What was trained with what: name and value."""
    recipe, summary = run.recipe, run.summary
    said = [("state", run.state), ("folder", str(run.path))]
    said += [
        (key, short(recipe[key]))
        for key in ("model", "scorer", "watch", "preferences", "prompts", "loss")
        if recipe.get(key)
    ]
    keys = ("learning_rate", "prompts_per_step", "samples_per_prompt", "max_tokens", "temperature", "seed", "engine")
    said += [(key.replace("_", " "), str(recipe[key])) for key in keys if key in recipe]
    if isinstance(summary.get("seconds"), int | float):
        said.append(("time", f"{summary['seconds'] / 60:.1f} minutes in all"))
    return said


def _finding(finding: dict[str, Any]) -> dict[str, Any]:
    steps = finding["steps"]
    first, last, count = steps["first"], steps["last"], steps["count"]
    seen = ""
    if isinstance(first, int) and isinstance(last, int):
        seen = (
            in_steps(range(first, last + 1))
            if count == last - first + 1
            else f"in {count} steps between {first + 1} and {last + 1}"
        )
    return {**finding, "seen": seen, "where": [place_in_words(Place(**p)) for p in finding["places"]]}


def _family(family: Family) -> dict[str, Any]:
    return {
        "label": family.label,
        "color": COLORS[family.index % len(COLORS)],
        "dash": dash(family),
        "several": len(family.runs) > 1,
    }


def _text(value: Any) -> str:
    """What a run or a model wrote: without control characters. The template escapes it."""
    return printable(str(value))


def _cell(value: str) -> str:
    more = len(value) - _LONGEST
    return _text(value if more <= 0 else f"{value[:_LONGEST]} [… {more} more characters]")

"""An explanation as one HTML page that needs nothing else: no network, no build, everything untrusted escaped."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from lossmith.errors import printable
from lossmith.explanation import Explanation, Number, Token
from lossmith.explanation.sentences import direction, short
from lossmith.report.explanation.level import LEVELS, level
from lossmith.report.explanation.terminal import how, multiplied, number
from lossmith.serving.text import visible

__all__ = ["explanation_page"]


def explanation_page(found: Explanation) -> str:
    """A whole HTML document."""
    return _template().render(
        e=found, title=f"{found.loss}, step {found.step}", data=_data(found), dots=_dots(found), levels=LEVELS,
        level=level, short=short, number=number, visible=visible, shown=_shown, label=_label,
    )  # fmt: skip


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("lossmith.report.explanation")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("page.html")


def _shown(text: str) -> Markup:
    """A token's text: line breaks get a sign that can be colored, and nothing is empty."""
    if not text:
        return Markup("·")
    return Markup(visible(text).replace("\n", Markup('<span class="nl">⏎</span>\n')))


def _label(token: Token) -> str:
    """What a screen reader says of a token."""
    pull = "not known" if token.pull is None else direction(token.pull)
    size = f" by {short(abs(token.pull))}" if token.pull else ""
    return f"{printable(token.text).strip() or 'blank'}: {pull}{size}"


# -- the numbers, told once for all tokens where they are the same -----------------------------------------------------


def _data(found: Explanation) -> Markup:
    """JSON for the script: what the rows are, and each token's values."""
    tokens = [
        {
            "id": t.id,
            "text": printable(t.text),
            "sentence": t.sentence,
            "values": [[value for _, _, _, value in rows] for _, rows in _sections(t)],
        }
        for t in found.tokens
    ]
    sections = [
        {"title": title, "rows": [row[:3] for row in rows]}
        for title, rows in (_sections(found.tokens[0]) if found.tokens else [])
    ]
    order = sorted(range(len(found.tokens)), key=lambda i: -abs(found.tokens[i].pull or 0.0))
    data = {"sections": sections, "tokens": tokens, "chosen": order[0] if order else 0}
    return Markup(json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"))


Row = tuple[str, str, str, float | None]  # name, words, its class on the page, value


def _sections(token: Token) -> list[tuple[str, list[Row]]]:
    made = [
        ("From the score to the advantage", _rows(token.credit)),
        ("Log-probabilities, nats", _rows(token.policies)),
        ("Policy against old policy", _rows(token.ratio)),
    ]
    for term in token.terms:
        rows = _rows(multiplied(term))
        if term.shared:
            rows += [("Σ over its completion", "of these products", "", term.sum)]
            rows += [("× share", "that each of its tokens gets", "", term.share)]
        made.append((f"The {term.name} term, {how(term)}", [*rows, ("= its pull", "", "total", term.pull)]))
    made.append(("Together", [("pull −dL/dlogp", "the terms added up", "total", token.pull)]))
    made.append(("Beside it", _rows(token.beside)))
    return [(title, rows) for title, rows in made if rows]


def _rows(numbers: tuple[Number, ...]) -> list[Row]:
    return [(n.name, n.words, "total" if n.name == "advantage" else "", n.value) for n in numbers]


# -- the group's scores on a line --------------------------------------------------------------------------------------


def _dots(found: Explanation) -> dict[str, Any] | None:
    """Where the group's scores lie on a line from 10 to 390; None where they are not known or all the same."""
    scores = [m.score for m in found.group if m.score is not None]
    if len(scores) < 2 or len(scores) < len(found.group) or min(scores) == max(scores):
        return None
    numbers = found.tokens[0].credit if found.tokens else ()
    shaped = any(n.name.startswith("after ") for n in numbers)
    baseline = None if shaped else next((n.value for n in numbers if n.name == "baseline"), None)
    if baseline is not None and not min(scores) <= baseline <= max(scores):
        baseline = None  # of another scale: a whole update's, say
    low, high = min(scores), max(scores)

    def place(x: float) -> float:
        return round(10 + 380 * (x - low) / (high - low), 1)

    mine = next(m.score for m in found.group if m.this)
    said = f"{len(scores)} scores from {short(low)} to {short(high)}; this completion's is {short(mine or 0.0)}"
    return {
        "places": [(place(m.score or 0.0), m.this) for m in found.group],
        "baseline": None if baseline is None else place(baseline),
        "value": baseline,
        "low": low,
        "high": high,
        "label": said if baseline is None else f"{said}, the baseline {short(baseline)}",
    }

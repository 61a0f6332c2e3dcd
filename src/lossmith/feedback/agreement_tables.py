"""What an agreement report holds, and how it is shown: every number with a plain word beside it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lossmith.intervals import FEWEST

__all__ = ["FEW", "Agreement", "AgreementReport", "AnnotatorSummary", "LookAgain", "PositionBias", "count", "short"]

FEW = 20  # common items; a measure of fewer may be far from what more would give


@dataclass(frozen=True)
class AnnotatorSummary:
    """One annotator. Answers are those that hold; undos and contradictions are of everything ever said."""

    annotator: str
    source: str
    ratings: int
    pairs: int
    rankings: int
    skips: int
    flags: int
    undos: int
    median_seconds: float  # of the answers whose time is known; NaN without any
    hasty: float  # share of those given in under two seconds
    circles: int  # triples of outputs judged a > b > c > a
    triples: int  # triples of which all three pairs were decided
    contradictions: int  # questions answered differently at different times, without an undo
    no_signal: int  # sets whose outputs were all rated the same, or ranked in one tier


@dataclass(frozen=True)
class Agreement:
    """One measure over what several annotators judged."""

    question: str  # rating, pair or ranking
    scale: str  # of ratings
    among: str  # "people", or "all" with scorers, models and imports
    measure: str
    value: float  # NaN where it is not defined
    words: str
    same: float  # share of identical answers, two annotators at a time
    items: int
    left_out: int  # common items that the measure cannot take in
    annotators: tuple[str, ...]


@dataclass(frozen=True)
class PositionBias:
    """How often the output shown first was preferred, of pairs that were decided."""

    source: str
    decided: int
    first: int
    share: float
    low: float  # 95% interval (Clopper-Pearson)
    high: float
    p_value: float  # two-sided, against one half
    words: str


@dataclass(frozen=True)
class LookAgain:
    """A set worth another look, and why."""

    set_id: str
    prompt: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class AgreementReport:
    annotators: tuple[AnnotatorSummary, ...]
    agreement: tuple[Agreement, ...]
    position_bias: tuple[PositionBias, ...]
    look_again: tuple[LookAgain, ...]
    sentences: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a number that is not defined is None."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def render(self) -> RenderableType:
        """Tables and sentences for a rich console."""
        parts: list[RenderableType] = []
        if self.annotators:
            parts += [_counts_table(self.annotators), _consistency_table(self.annotators)]
        if self.agreement:
            parts.append(_agreement_table(self.agreement))
        if self.position_bias:
            parts.append(_position_table(self.position_bias))
        parts += [Text(sentence) for sentence in self.sentences]
        if self.look_again:
            items = [(item.set_id, item.prompt, "; ".join(item.reasons)) for item in self.look_again]
            parts += ["", _table("Look at these again", ("set", "prompt", "why"), items)]
        return Group(*parts)

    def text(self, width: int = 120) -> str:
        """The same without color, for a file or a log."""
        console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
        with console.capture() as captured:
            console.print(self.render())
        return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def short(text: str, width: int = 60) -> str:
    """One line of printable characters: a prompt may hold a terminal's escape codes."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _name(row: AnnotatorSummary) -> str:
    return short(row.annotator) + ("" if row.source == "person" else f" ({row.source})")


def _counts_table(rows: Sequence[AnnotatorSummary]) -> Table:
    names = ("annotator", "ratings", "pairs", "rankings", "skips", "flags", "undos")
    cells = [(_name(r), r.ratings, r.pairs, r.rankings, r.skips, r.flags, r.undos) for r in rows]
    return _table("Answers", names, cells)


def _consistency_table(rows: Sequence[AnnotatorSummary]) -> Table:
    names = ("annotator", "median seconds", "under 2 s", "circles", "answers changed", "sets all equal")
    cells = [
        (
            *(_name(r), _number(r.median_seconds, ".1f"), _number(r.hasty, ".0%")),
            *(f"{r.circles} of {r.triples}" if r.triples else "–", r.contradictions, r.no_signal),
        )
        for r in rows
    ]
    return _table("Consistency", names, cells)


def _agreement_table(rows: Sequence[Agreement]) -> Table:
    names = ("judged", "among", "by", "items", "measure", "value", "in words", "same answer")
    cells = [
        (
            *(f"{r.question} {r.scale}".strip(), r.among, len(r.annotators), r.items, r.measure),
            *(
                _number(r.value, ".3f"),
                r.words + (", few items" if FEWEST <= r.items < FEW else ""),
                _number(r.same, ".0%"),
            ),
        )
        for r in rows
    ]
    return _table("Agreement", names, cells)


def _position_table(rows: Sequence[PositionBias]) -> Table:
    names = ("source", "decided pairs", "first shown preferred", "95% interval", "p", "in words")
    cells = [
        (r.source, r.decided, f"{r.first} ({r.share:.0%})", f"{r.low:.0%} to {r.high:.0%}", f"{r.p_value:.2g}", r.words)
        for r in rows
    ]
    return _table("Position", names, cells)


def _table(title: str, names: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")  # a name cut short could be two annotators
    for row in rows:
        table.add_row(*(Text(short(str(cell), 300)) for cell in row))  # Text: a name's brackets are no markup
    return table


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value

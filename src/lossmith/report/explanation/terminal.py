"""An explanation in the terminal: the completion in color, its group, and one token's chain of numbers."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lossmith.errors import RunError, printable
from lossmith.explanation import Explanation, Number, Term, Token
from lossmith.explanation.sentences import short
from lossmith.report.explanation.level import LEVELS, level

__all__ = ["show"]

# Blue and orange stay apart for every kind of color vision; the sign stands beside them.
_UP = ("", "#d6e6f5", "#a9cdea", "#74aedb", "#3f8bc6", "#1f6aa5")
_DOWN = ("", "#fbe3cd", "#f6c497", "#eea05c", "#d97b29", "#b85e12")


def show(console: Console, found: Explanation, token: int | None = None) -> None:
    """Print it. token: whose chain is shown, the most pushed one's if not given. RunError: there is no such token."""
    chosen = _chosen(found, token)
    where = f"step {found.step}, prompt {found.prompt_number} of {found.prompts}, sample {found.sample}"
    console.print(f"[bold]{escape(found.source)}[/], {where}, through [bold]{escape(found.loss)}[/]", highlight=False)
    console.print(Text(printable(found.prompt), style="italic"))
    console.print()
    console.print(_completion(found))
    console.print()
    console.print(found.sentence, highlight=False, markup=False)
    console.print(_legend(found))
    console.print(_group(found, console.width))
    if chosen is not None:
        console.print(_chain(chosen))
        console.print(chosen.sentence, highlight=False, markup=False)
    if found.gap is not None:
        checked = f"the chains of the step's tokens add up to dL/dlogp by autograd within {found.gap:.1g}"
        console.print(checked, style="dim", highlight=False)
    if found.unknown:
        console.print(f"not recorded: {', '.join(found.unknown)}", highlight=False)
    for note in found.notes:
        console.print(f"note: {escape(note)}", highlight=False)


def _chosen(found: Explanation, place: int | None) -> Token | None:
    if not found.tokens:
        return None
    if place is None:
        return max(found.tokens, key=lambda t: abs(t.pull or 0.0))
    if not 0 <= place < len(found.tokens):
        raise RunError(f"--token {place}: the completion has the tokens 0 to {len(found.tokens) - 1}.")
    return found.tokens[place]


def _completion(found: Explanation) -> Text:
    """Tokens in their colors; a sign before the first of a run of one direction."""
    text, before = Text(), 0
    for token in found.tokens:
        strength = level(token.pull, found.largest)
        sign = (strength > 0) - (strength < 0)
        if sign != before:
            text.append({1: "[+]", -1: "[−]", 0: "[0]"}[sign], style="bold")
        before = sign
        color = (_UP if strength > 0 else _DOWN)[abs(strength)]
        style = f"{'white' if abs(strength) == LEVELS else 'black'} on {color}" if strength else "dim"
        text.append(printable(token.text) or "·", style=style)
    return text


def _legend(found: Explanation) -> Text:
    text = Text("pull −dL/dlogp: ", style="dim")
    text.append("+ pushed up ", style=f"black on {_UP[3]}")
    text.append(" ")
    text.append("− pushed down ", style=f"black on {_DOWN[3]}")
    text.append(f" the darkest is ±{short(found.largest)}", style="dim")
    return text


def _group(found: Explanation, width: int) -> Table:
    table = _table(f"the {len(found.group)} recorded completions of its prompt")
    for column in ("sample", "score", "advantage", "tokens", "pull"):
        table.add_column(column, justify="right")
    table.add_column("completion", no_wrap=True)
    room = max(12, width - 64)
    for m in sorted(found.group, key=lambda m: -(m.score or 0.0)):
        beginning = " ".join(printable(m.completion).split())
        shown = Text(beginning if len(beginning) <= room else beginning[: room - 1] + "…")
        table.add_row(
            f"{'▸ ' if m.this else ''}{m.sample}", number(m.score), number(m.advantage, True), str(m.length),
            number(m.pull, True), shown, style="bold" if m.this else None,
        )  # fmt: skip
    return table


def _chain(token: Token) -> Table:
    table = _table(f"token {token.place}, {printable(token.text)!r}")
    table.add_column("")
    table.add_column("number", justify="right")
    table.add_column("")
    for title, numbers in (
        ("from the score to the advantage", token.credit),
        ("log-probabilities, nats", token.policies),
        ("policy against old policy", token.ratio),
    ):
        _rows(table, title, numbers)
    for term in token.terms:
        _rows(table, f"the {term.name} term, {how(term)}", multiplied(term))
        if term.shared:
            table.add_row("  Σ over its completion", number(term.sum), "of these products")
            table.add_row("  × share", number(term.share), "that each of its tokens gets")
        table.add_row("  = its pull", number(term.pull, True), "", style="bold")
    table.add_row("pull −dL/dlogp", number(token.pull, True), "the terms added up", style="bold", end_section=True)
    _rows(table, "beside it", token.beside)
    return table


def multiplied(term: Term) -> tuple[Number, ...]:
    """The factors, with a sign between them."""
    return tuple(replace(n, name=f"× {n.name}" if i else n.name) for i, n in enumerate(term.factors))


def how(term: Term) -> str:
    """How its numbers go together."""
    return "measured by autograd" if term.measured else "a product"


def _rows(table: Table, title: str, numbers: tuple[Number, ...]) -> None:
    if not numbers:
        return
    table.add_row(Text(title, style="italic"))
    for n in numbers:
        table.add_row(Text(f"  {n.name}"), number(n.value), Text(n.words))


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)


def number(x: float | None, signed: bool = False) -> str:
    """Six digits, to be multiplied again, with a real minus sign; a dash for what is not known."""
    if x is None:
        return "–"
    return f"{x:{'+' if signed and x else ''}.6g}".replace("-", "−")

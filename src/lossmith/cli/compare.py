"""`lossmith losses compare A B`: why two runs with the "same" loss differ."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lossmith.adapters.configurations import read
from lossmith.cli.completion import A_LOSS
from lossmith.cli.configurations import is_configuration, show_not_understood, summary, title
from lossmith.cli.losses import Json, example
from lossmith.cli.streams import print_json
from lossmith.report.loss import RATIOS, Comparison
from lossmith.report.loss import compare as side_by_side
from lossmith.terminal import Terminal, put_table

__all__ = ["compare"]


def compare(*names: Annotated[str, A_LOSS], as_json: Json = False) -> None:
    """Losses side by side: formulas, weights, advantages, and the defaults that differ.

    Parameters
    ----------
    names
        Two losses or more: grpo@trl grpo@verl "grpo(beta=0)". A configuration file of a trainer is the loss that it
        is: grpo.yaml run_verl.sh
    as_json
        Print JSON.
    """
    readings = {name: read(name) for name in names if is_configuration(name)}
    found = side_by_side([readings[name].loss if name in readings else example(name) for name in names])
    if as_json:
        plain = asdict(found) | {"ratios": RATIOS, "files": {name: summary(r) for name, r in readings.items()}}
        plain["advantages"] = [{"rewards": k, "advantages": v} for k, v in found.advantages.items()]
        print_json(plain, indent=2)
        return
    console = Terminal()
    for name, reading in readings.items():
        console.print(f"{name} is {reading.call}, of {title(reading)}", markup=False, highlight=False)
        show_not_understood(console, reading)
    for a, b in found.same:
        console.print(f"[bold]{escape(a)} and {escape(b)} are the same composition.[/]")
    _differences(console, found)
    _advantages(console, found)
    _weights(console, found)
    _formulas(console, found)


def _table(title: str, first: str, names: tuple[str, ...], justify: str = "left") -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(first)
    for name in names:
        table.add_column(escape(name), justify=justify)  # type: ignore[arg-type]
    return table


def _differences(console: Console, found: Comparison) -> None:
    """Axes with what each choice says of itself, then numbers."""
    table = _table("what differs", "", found.names)
    for d in found.differences:
        if not d.words:
            table.add_row(d.name, *(_marked(v, d.values[0]) for v in d.values))
            continue
        words = [f"{v}: {w}" if w else v for v, w in zip(d.values, d.words, strict=True)]
        table.add_row(f"[bold]{d.name}[/]", *(_marked(w, words[0]) for w in words))
    put_table(console, table)


def _marked(value: str, first: str) -> str:
    """What is not as in the first loss stands out, without color too."""
    return escape(value) if value == first else f"[yellow]≠ {escape(value)}[/]"


def _advantages(console: Console, found: Comparison) -> None:
    table = _table("advantages of one group", "rewards", found.names)
    for rewards, rows in found.advantages.items():
        texts = [row if isinstance(row, str) else "  ".join(f"{a:.5g}" for a in row) for row in rows]
        table.add_row(escape(str(list(rewards))), *(_marked(t, texts[0]) for t in texts))
    put_table(console, table)


def _weights(console: Console, found: Comparison) -> None:
    table = _table("w(r, A): dL/dlogp = −w·A/Z", "", tuple(f"r={r:g}" for r in RATIOS), justify="right")
    for sign, rows in found.weights.items():
        for name, row in zip(found.names, rows, strict=True):
            if row is None:
                table.add_row(f"{sign}  {escape(name)}", "no weight per token")
                continue
            first = rows[0] or row
            cells = [_marked(f"{w:.4g}", f"{f:.4g}") for w, f in zip(row, first, strict=True)]
            table.add_row(f"{sign}  {escape(name)}", *cells)
    put_table(console, table)


def _formulas(console: Console, found: Comparison) -> None:
    """Lines that the first loss does not have are marked."""
    known = set(found.formulas[0].splitlines())
    console.print("[bold]formulas[/]")
    for name, formula in zip(found.names, found.formulas, strict=True):
        console.print(f"[bold]{escape(name)}[/]")
        for line in formula.splitlines():
            new = line not in known
            console.print(f"{'≠' if new else ' '} {escape(line)}", style="yellow" if new else "dim", highlight=False)

"""`lossmith losses list` and `lossmith losses show NAME`."""

from __future__ import annotations

import json
import warnings
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lossmith.errors import TrapWarning
from lossmith.losses import CATALOGUE, Loss, describe, list_losses, parse_loss

__all__ = ["list_", "show"]

RATIOS = (0.1, 0.5, 0.9, 1.0, 1.15, 1.5, 2.5, 10.0)
Json = Annotated[bool, Parameter(name="--json", negative="")]


def list_(*, as_json: Json = False) -> None:
    """Every loss of the catalogue: name, year, how far it couples, what it needs, one line.

    Parameters
    ----------
    as_json
        Print JSON.
    """
    rows = [_summary(name) for name in (entry.name for entry in list_losses())]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(title=f"{len(rows)} losses; `lossmith losses show NAME` for one")
    for column in ("name", "year", "couples", "needs", "what it is"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["name"], str(row["year"]), row["coupling"], ", ".join(row["needs"]), row["summary"])
    Console().print(table)


def show(name: str, /, *, latex: Annotated[bool, Parameter(negative="")] = False, as_json: Json = False) -> None:
    """One loss: its formula, weight table, parameters and paper.

    Parameters
    ----------
    name
        A name, or a loss with other parameters: "grpo(beta=0.04, clip_high=0.28)".
    latex
        The formula as LaTeX alone.
    as_json
        Print JSON.
    """
    loss = _quietly(name)
    if latex:
        print(loss.formula("latex"))
        return
    weights = {sign: [float(loss.weight(r, a)) for r in RATIOS] for sign, a in (("A > 0", 1.0), ("A < 0", -1.0))}
    if as_json:
        extra = {"formula": str(loss), "latex": loss.formula("latex"), "ratios": RATIOS, "weights": weights}
        print(json.dumps(_summary(loss.name, loss) | extra | {"parameters": loss.to_dict()}, indent=2))
        return
    _show(loss, weights)


def _quietly(name: str) -> Loss:
    """The loss; its traps are shown as part of the page, not as warnings beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrapWarning)
        return parse_loss(name)


def _summary(name: str, loss: Loss | None = None) -> dict:
    entry = CATALOGUE[name]
    loss = loss or _quietly(name)
    return {
        "name": name,
        "year": entry.year,
        "paper": entry.paper,
        "summary": entry.summary,
        "demonstration": entry.demonstration,
        "coupling": loss.coupling,
        "needs": sorted(loss.needs),
        "uses_old_logp": loss.uses_old,
        "traps": list(loss.traps),
    }


def _show(loss: Loss, weights: dict[str, list[float]]) -> None:
    console, entry = Console(), CATALOGUE[loss.name]
    console.print(f"[bold]{loss.name}[/]  {escape(entry.summary)}\n[dim]{escape(entry.paper)}, {entry.year}[/]\n")
    console.print(str(loss), markup=False, highlight=False)
    for trap in loss.traps:
        console.print(f"\n[bold red]trap[/]  {escape(trap)}.")
    needs = ", ".join(sorted(loss.needs)) + (", old_logp (None means ratio 1)" if loss.uses_old else "")
    console.print(f"\nneeds logp, mask, {needs}; couples rows by {loss.coupling}", highlight=False)
    table = Table(title="w(r, A): dL/dlogp = −w·A/Z", title_justify="left")
    table.add_column("ratio r", justify="right")
    for ratio in RATIOS:
        table.add_column(f"{ratio:g}", justify="right")
    for sign, row in weights.items():
        table.add_row(sign, *(f"{w:.4g}" for w in row))
    console.print(table)
    console.print(_parameters(loss))


def _parameters(loss: Loss) -> Table:
    table = Table(title="choices and parameters (any can be set by name)", title_justify="left")
    for column in ("name", "value", "meaning"):
        table.add_column(column)
    for name, value, meaning in describe(loss):
        table.add_row(name, escape(str(value)), escape(meaning))
    return table

"""`lossmith losses list` and `lossmith losses show NAME`; `compare` and `from` are beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lossmith.cli.completion import A_LOSS
from lossmith.cli.streams import print_json
from lossmith.errors import LossError, quiet_traps
from lossmith.files import check_writable, write_atomically
from lossmith.losses import Loss, PolicyLoss, describe, example_loss, find_entry, list_losses, parse_loss
from lossmith.losses.batch import FIELDS
from lossmith.losses.catalogue.entry import Entry
from lossmith.report.loss import RATIOS, changes_of_preset, weight_plot
from lossmith.report.loss.catalogue_page import FAMILIES
from lossmith.report.loss.comparison import weights
from lossmith.terminal import Terminal, put_table

__all__ = ["example", "list_", "named_loss", "show", "show_weights"]

Json = Annotated[bool, Parameter(name="--json", negative="")]


def list_(*, presets: Annotated[bool, Parameter(negative="")] = False, as_json: Json = False) -> None:
    """Every loss of the catalogue: name, year, how far it couples, what it needs, one line.

    Parameters
    ----------
    presets
        Show the libraries' presets (name@library) instead.
    as_json
        Print JSON, presets included.
    """
    entries = list_losses()
    if as_json:
        print_json([_summary(entry, _example(entry)) for entry in entries], indent=2)
        return
    chosen = [e for e in entries if bool(e.preset_of) == presets]
    console = Terminal()
    console.print(_overview(chosen, "presets" if presets else "losses", wide=console.width >= 110))
    if not presets:
        count = sum(bool(e.preset_of) for e in entries)
        console.print(f"\nand {count} presets of other libraries' defaults: lossmith losses list --presets")


def _overview(chosen: list[Entry], what: str, *, wide: bool) -> Table:
    """A row a loss; on a narrow terminal without year, coupling and needs (`show` has them)."""
    table = Table(title=f"{len(chosen)} {what}; `lossmith losses show NAME` for one", pad_edge=False, box=None)
    for column in ("name", "year", "couples", "needs") if wide else ("name",):
        table.add_column(column, no_wrap=column != "needs", overflow="fold")
    table.add_column("what it is", overflow="fold")
    family = None
    for entry in chosen:
        if not entry.preset_of and entry.family != family:
            family = entry.family
            title = f"[bold]{escape(FAMILIES.get(family, family))}[/]"
            table.add_row(*[""] * (4 if wide else 1), title)
        row = _summary(entry, _example(entry))
        name = escape(entry.name) + (" [red](trap)[/]" if row["traps"] else "")
        facts = (str(entry.year or ""), row["coupling"], ", ".join(row["needs"])) if wide else ()
        table.add_row(name, *facts, escape(entry.summary))
    return table


def show(
    name: Annotated[str, A_LOSS],
    /,
    *,
    latex: Annotated[bool, Parameter(negative="")] = False,
    code: Annotated[bool, Parameter(negative="")] = False,
    plot: Path | None = None,
    as_json: Json = False,
) -> None:
    """One loss: its formula, weight table, parameters and paper.

    Parameters
    ----------
    name
        A name, or a loss with other parameters: "grpo(beta=0.04, clip_high=0.28)", "grpo@trl", "my.py:mine".
    latex
        The formula as LaTeX alone.
    code
        The loss as plain torch alone.
    plot
        Write the curve of its weight to this SVG file.
    as_json
        Print JSON.
    """
    loss = named_loss(name)
    entry = _entry(name)
    if latex or code:
        print(loss.formula("latex") if latex else _listing(loss))
        return
    if plot is not None:
        write_plot(loss, plot)
        return
    if as_json:
        extra: dict[str, Any] = {"formula": str(loss), "latex": loss.formula("latex"), "ratios": RATIOS}
        extra |= {"weights": weights(loss), "parameters": loss.to_dict()}
        print_json(_summary(entry, loss) | extra, indent=2)
        return
    _show(entry, loss)


def named_loss(name: str) -> Loss:
    """The loss of a name, a call or a path. Its traps are shown on the page, not as warnings beside it."""
    with quiet_traps():
        return parse_loss(name)


def write_plot(loss: Loss, path: Path) -> None:
    """The weight's curve as a file. LossError: not an SVG, a place that cannot be written, or nothing to plot."""
    if path.suffix.lower() != ".svg":
        raise LossError(f"--plot writes SVG: give a name that ends in .svg, not {path}.")
    path = check_writable(path, LossError)
    write_atomically(path, weight_plot(loss))
    Terminal().print(f"the weight of {loss.name} is drawn in {path}", highlight=False, markup=False)


def _entry(name: str) -> Entry:
    return find_entry(name.partition("(")[0].strip())


def _example(entry: Entry) -> Loss:
    with quiet_traps():
        return entry.build().replace(name=entry.name)


def _summary(entry: Entry, loss: Loss) -> dict[str, Any]:
    return {
        "name": entry.name,
        "year": entry.year,
        "paper": entry.paper,
        "summary": entry.summary,
        "family": entry.family,
        "preset_of": entry.preset_of,
        "aliases": list(entry.aliases),
        "demonstration": entry.demonstration,
        "coupling": loss.coupling,
        "needs": sorted(loss.needs),
        "uses_old_logp": loss.uses_old,
        "traps": list(loss.traps),
    }


def _listing(loss: Loss) -> str:
    try:
        return loss.code()
    except NotImplementedError as error:
        raise LossError(str(error)) from None


def _show(entry: Entry, loss: Loss) -> None:
    console = Terminal()
    source = ", ".join(x for x in (entry.paper, str(entry.year or "")) if x) or entry.origin
    console.print(f"[bold]{escape(entry.name)}[/]  {escape(entry.summary)}\n[dim]{escape(source)}[/]\n")
    console.print(str(loss), markup=False, highlight=False)
    for trap in loss.traps:
        console.print(f"\n[bold red]trap[/]  {escape(trap)}.")
    console.print("\n" + _needs(loss), highlight=False, markup=False)
    if entry.preset_of:
        _show_preset(console, entry)
    show_weights(console, loss)
    if isinstance(loss, PolicyLoss):
        put_table(console, _parameters(loss))


def _needs(loss: Loss) -> str:
    lines = [f"couples rows by {loss.coupling}; needs logp, mask and"]
    for name in sorted(loss.needs):
        missing = "a parameter without an agreed default: give it"
        lines.append(f"  {name}: {FIELDS[name].provider if name in FIELDS else missing}")
    if loss.uses_old:
        lines.append("  old_logp: a forward pass at the start of the update; without it the ratio is 1")
    return "\n".join(lines) if len(lines) > 1 else lines[0].removesuffix(" and") + " alone"


def _show_preset(console: Console, entry: Entry) -> None:
    table = Table(title=f"what differs from {entry.preset_of}", title_justify="left", pad_edge=False, box=None)
    for column in ("parameter", entry.preset_of, entry.name):
        table.add_column(column)
    for difference in changes_of_preset(entry.name):
        table.add_row(difference.name, *map(escape, difference.values))
    put_table(console, table)


def show_weights(console: Console, loss: Loss) -> None:
    missing = sorted(loss.needs - FIELDS.keys() - {"max_length"})
    if missing:
        console.print(f"\nits weight depends on {', '.join(missing)}: show it with a value", highlight=False)
        return
    rows = weights(loss)
    if rows is None:
        console.print("\nno weight per token: the loss is a function of whole completions", highlight=False)
        return
    scale = "dL/dlogp = −w·A/Z" if isinstance(loss, PolicyLoss) else "by autograd, 1 at r = 1"
    table = Table(title=f"w(r, A): {scale}", title_justify="left")
    table.add_column("ratio r", justify="right")
    for ratio in RATIOS:
        table.add_column(f"{ratio:g}", justify="right")
    for sign, row in rows.items():
        table.add_row(sign, *(f"{w:.4g}" for w in row))
    put_table(console, table)


def _parameters(loss: PolicyLoss) -> Table:
    table = Table(title="choices and parameters (any can be set by name)", title_justify="left")
    for column in ("name", "value", "meaning"):
        table.add_column(column)
    for name, value, meaning in describe(loss):
        table.add_row(name, escape(str(value)), escape(meaning))
    return table


def example(name: str) -> Loss:
    """A loss to look at: parameters without a default get example values."""
    return example_loss(name) if "(" not in name and ":" not in name else named_loss(name)

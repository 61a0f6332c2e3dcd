"""`lossmith audit LOSS`: what a loss provably does, with numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lossmith.cli.completion import A_LOSS
from lossmith.cli.losses import example
from lossmith.cli.streams import print_json
from lossmith.errors import LossError, ProofError, quiet_traps
from lossmith.files import check_writable, write_atomically
from lossmith.losses import Loss
from lossmith.proofs.auditing import Audit, audit
from lossmith.report.audit.page import html_page
from lossmith.report.audit.sentences import Section, sections
from lossmith.report.loss import weight_plot
from lossmith.terminal import Terminal, put_table

__all__ = ["audit_", "show_sections"]


def audit_(
    loss: Annotated[str, A_LOSS],
    /,
    *,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    html: Path | None = None,
) -> None:
    """What a loss provably does: its expected gradient by exact enumeration, noise, length, invariances, checks.

    Parameters
    ----------
    loss
        A name, or a loss with other parameters: "grpo(beta=0.04, clip_high=0.28)". Parameters without an agreed
        default get an example value.
    as_json
        Print JSON.
    html
        Write the page to this file.
    """
    if html is not None:
        html = check_writable(html, ProofError)
    console = Terminal(stderr=True)
    with quiet_traps(), console.status("measuring what the loss does"):  # traps are shown on the page
        asked = example(loss)
        found = audit(asked)
    if html is not None:
        write_atomically(html, html_page(found, _figure(asked)))
    if as_json:
        print_json(found.to_dict(), indent=2)
    elif html is not None:
        Terminal().print(f"wrote {html}", markup=False, highlight=False, soft_wrap=True)
    else:
        _show(found)


def _figure(loss: Loss) -> str:
    """The weight's curve; nothing for a loss without a weight per token."""
    try:
        return weight_plot(loss)
    except LossError:
        return ""


def _show(found: Audit) -> None:
    console = Terminal()
    console.print(f"[bold]{escape(found.name)}[/]  {escape(found.summary or '')}")
    if found.paper:
        console.print(f"[dim]{escape(found.paper)}, {found.year}[/]")
    console.print()
    console.print(found.formula, markup=False, highlight=False)
    for trap in found.traps:
        console.print(f"\n[bold red]trap[/]  {escape(trap)}.")
    needs = ", ".join(("logp", "mask", *found.needs))
    console.print(f"\nneeds {needs}; couples rows by {found.coupling}", markup=False, highlight=False)
    for note in found.notes:
        console.print(note, markup=False, highlight=False)
    show_sections(console, found)


def show_sections(console: Console, found: Audit) -> None:
    """Everything that was measured, a table a subject."""
    for section in sections(found):
        console.print()
        put_table(console, _table(section))


def _table(section: Section) -> Table:
    table = Table(
        title=escape(section.title),
        title_justify="left",
        caption=escape(section.note) or None,
        caption_justify="left",
        show_header=False,
    )
    table.add_column("what")
    table.add_column("number", justify="right")
    table.add_column("meaning")
    for line in section.lines:
        table.add_row(escape(line.label), escape(line.number), escape(line.text))
    return table

"""What is written to: a console that heeds NO_COLOR, and tables that stay readable where they do not fit."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = ["Terminal", "bars_are_seen", "put_table"]


class Terminal(Console):
    """Standard output or error. Where NO_COLOR is set, rich drops colors by itself; here bold and dim go too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(color_system=None if os.environ.get("NO_COLOR") else "auto", **options)


def bars_are_seen() -> bool:
    """Whether a library's progress bar on standard error would be seen to move; a log would get hundreds of them."""
    return sys.stderr is not None and sys.stderr.isatty()


def put_table(to: Console, table: Table) -> None:
    """The table; where a column would be narrower than its longest word, its rows one below the other instead."""
    if to.measure(table, options=to.options.update(width=10_000)).minimum <= to.width:
        to.print(table)
        return
    if table.title:
        to.print(Text.from_markup(table.title) if isinstance(table.title, str) else table.title, style="italic")
    columns = [(column.header, list(column.cells)) for column in table.columns]
    for cells in zip(*(cells for _, cells in columns), strict=True):
        first, *rest = zip((header for header, _ in columns), cells, strict=True)
        to.print(first[1], style="bold", highlight=False)
        for header, cell in rest:
            if str(cell):
                to.print(Padding(_named(header, cell), (0, 0, 0, 2)), highlight=False)


def _named(header: Any, cell: Any) -> Any:
    """`header: cell` in a line, or what it holds below its header."""
    if not isinstance(cell, str | Text):
        return Group(header, cell)
    text = Text.from_markup(cell) if isinstance(cell, str) else cell
    return Text.assemble(str(header), ": " if str(header) else "", text)

"""How `--help` looks: no boxes, so that it reads the same on a terminal of any width, in a pipe and in a log."""

from __future__ import annotations

from typing import Any

from cyclopts.help import DescriptionRenderer, HelpPanel
from rich.console import Console, ConsoleOptions
from rich.text import Text

__all__ = ["PlainHelp"]

_BESIDE = 30  # columns that a name may take beside its description
_NARROW = 60  # columns of a terminal under which every description stands below its name


class PlainHelp:
    """A formatter for cyclopts: a title, then names and their descriptions."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        if not panel.entries:
            return
        console.print()
        console.print(Text(str(panel.title), style="bold"))
        labels = [" ".join(entry.display_labels_with_metavar) for entry in panel.entries]
        beside = max((len(label) for label in labels if len(label) <= _BESIDE), default=0) + 4
        beside = 6 if console.width < _NARROW else beside
        for label, entry in zip(labels, panel.entries, strict=True):
            width = max(console.width - beside, 10)
            lines = console.render_lines(DescriptionRenderer()(entry), options.update(width=width), pad=False)
            meaning = [Text.assemble(*((part.text, part.style or "") for part in line)) for line in lines]
            name = Text("  " + label, style="cyan")
            if len(name) + 2 <= beside and meaning:
                name.pad_right(beside - len(name))
                name += meaning.pop(0)
            for line in (name, *(Text(" " * beside) + line for line in meaning)):
                line.rstrip()
                console.print(line, soft_wrap=True)

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        """`Usage: lossmith COMMAND`."""
        if usage:
            console.print(Text.assemble(("Usage: ", "bold"), str(usage).removeprefix("Usage: ")), soft_wrap=True)

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        """What the command does, in full."""
        lines = console.render_lines(description, pad=False) if description else []
        text = "\n".join("".join(part.text for part in line).rstrip() for line in lines).strip()
        if text:
            console.print(text, soft_wrap=True, markup=False, highlight=False)

"""The commands with their options as `--help` says them, and the API from its docstrings."""

from __future__ import annotations

import io
from collections.abc import Iterator

import lossmith
from lossmith.cli import app
from lossmith.terminal import Terminal

# What people import, a section each; a module's public names are its `__all__`.
MODULES = (
    ("lossmith.losses", "The heart: a loss as a value. Torch and nothing else."),
    ("lossmith.proofs", "Whether a loss is what its name says."),
    ("lossmith.scorers", "Where rewards come from."),
    ("lossmith.feedback", "Output sets, judgements, preferences."),
    ("lossmith.reward_model", "A reward model from preferences."),
    ("lossmith.replay", "Recorded rollouts, through other losses."),
    ("lossmith.detectors", "What can be wrong with a run."),
    ("lossmith.adapters.trl", "Inside TRL."),
    ("lossmith.adapters.hooks", "What each other trainer's hook carries."),
    ("lossmith.adapters.configurations", "Which loss a trainer's configuration is."),
    ("lossmith.errors", "What can go wrong."),
)


def commands() -> str:
    """Every command in the order of its help."""
    parts = ["# Commands", "What `lossmith COMMAND --help` says, in the order of the work.", _help(())]
    for words in _commands():
        parts += [f"## lossmith {' '.join(words)}", _help(words)]
    return "\n\n".join(parts) + "\n"


def _commands() -> Iterator[tuple[str, ...]]:
    for name in (n for n in app if not n.startswith("-")):
        below = [n for n in app[name] if not n.startswith("-")]
        yield from [(name, n) for n in below] or [(name,)]


def _help(words: tuple[str, ...]) -> str:
    out = io.StringIO()
    app.help_print(list(words), console=Terminal(file=out, width=92))
    return f"```text\n{out.getvalue().strip()}\n```"


def api() -> str:
    """The names of the package itself, then those of its modules that are not among them."""
    parts = [
        "# Python",
        "`import lossmith as ls` gives the names of the first part; each is imported when it is first used. The others "
        "are imported from where they stand.",
        "## lossmith",
    ]
    parts += [_one(f"lossmith.{name}") for name in lossmith.__all__ if name != "losses"]
    for module, what in MODULES:
        parts += [f"## {module}", what, _module(module)]
    return "\n\n".join(parts) + "\n"


def _one(dotted: str) -> str:
    return f"::: {dotted}\n    options:\n      heading_level: 3\n"


def _module(module: str) -> str:
    return f"::: {module}\n    options:\n      heading_level: 3\n      show_root_heading: false\n"

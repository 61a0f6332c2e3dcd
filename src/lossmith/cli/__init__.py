"""The command `lossmith`, and its subcommands."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import sys
from pathlib import Path
from typing import NoReturn

import cyclopts
from rich.text import Text

from lossmith import __version__
from lossmith.cli.completion import answer, installer
from lossmith.cli.help import PlainHelp
from lossmith.cli.streams import bear_every_character, check_names
from lossmith.errors import LossmithError, printable
from lossmith.terminal import Terminal

__all__ = ["app", "main"]


# The commands in the order of the work: {title: {command: (file in this folder, its function)}}. A command with a
# space belongs to a group of commands, whose one line stands in _GROUPS.
_WORK: dict[str, dict[str, tuple[str, str]]] = {
    "From prompts to a policy": {
        "init": ("project", "init"),
        "status": ("project", "status"),
        "sample": ("sample", "sample"),
        "annotate": ("annotate", "annotate"),
        "reward train": ("reward", "train"),
        "train": ("train", "train"),
        "prefer": ("prefer", "prefer"),
        "chat": ("chat", "chat"),
        "merge": ("merge", "merge"),
    },
    "What a loss is and does": {
        "tour": ("explore", "tour"),
        "explore": ("explore", "explore"),
        "losses list": ("losses", "list_"),
        "losses show": ("losses", "show"),
        "losses compare": ("compare", "compare"),
        "losses from": ("configurations", "from_"),
        "audit": ("audit", "audit_"),
    },
    "What happened in a run": {
        "plot": ("plot", "plot"),
        "doctor": ("doctor", "doctor_"),
        "replay": ("replay", "replay"),
        "explain": ("explain", "explain"),
        "report": ("report", "report"),
    },
    "Machines and other trainers": {
        "bench": ("bench", "bench"),
        "plan": ("plan", "plan"),
        "export verl": ("export", "verl"),
    },
}
_GROUPS = {
    "losses": "The catalogue of losses: formulas, weights, parameters, papers.",
    "reward": "Reward models, trained from preferences.",
    "export": "A recipe as a folder that another trainer runs.",
}


def _docstring(file: str, function: str) -> str | None:
    """Read without importing the file, which takes seconds."""
    tree = ast.parse(Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8"))
    return ast.get_docstring(next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function))


def _app() -> cyclopts.App:
    """Every command under its title, in the order of the work; one is imported when it is given."""
    made = cyclopts.App(
        name="lossmith",
        help="Policy learning for RLHF, with a loss that is what its name says.",
        version=__version__,
        suppress_keyboard_interrupt=False,  # main says that it stopped
        default_parameter=cyclopts.Parameter(negative_iterable=()),
        help_formatter=PlainHelp(),
    )
    more = cyclopts.Group("More", sort_key=len(_WORK))
    made["--help"].group = made["--version"].group = more
    groups: dict[str, cyclopts.App] = {}
    place = itertools.count()
    for number, (title, commands) in enumerate(_WORK.items()):
        group = cyclopts.Group(title, sort_key=number)
        for words, (file, function) in commands.items():
            parent, _, name = words.rpartition(" ")
            if parent and parent not in groups:
                groups[parent] = cyclopts.App(name=parent, help=_GROUPS[parent], group=group, sort_key=next(place))
                made.command(groups[parent])
            groups.get(parent, made).command(
                f"lossmith.cli.{file}:{function}",
                name=name,
                help=_docstring(file, function),
                sort_key=next(place),
                group=None if parent else group,
            )
    made.command(installer(made), name="--install-completion", group=more)
    return made


app = _app()


def _run() -> None:
    """The command. BrokenPipeError: whoever read the output is gone, which rich would call an error of its own."""
    check_names()
    if sys.argv[1:2] == ["__complete"]:  # cyclopts' answer, without importing the command that is being typed
        return answer(app, sys.argv[2:])
    app.console = Terminal()  # made now: it takes COLUMNS as it is when it is made
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):
            raise BrokenPipeError from None
        sys.stdout.flush()  # or a broken pipe would be met after the last line of Python
        raise


def main() -> None:
    """Run the command. What the user can mend is one message and exit code 2, not a traceback."""
    bear_every_character()
    try:
        _run()
    except (LossmithError, cyclopts.CycloptsError) as error:
        from lossmith.cli.words import said  # torch comes with it, and --help needs none

        _say(Text.assemble(("error: ", "bold red"), said(app, error)), error)
        sys.exit(2)
    except BrokenPipeError as error:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _say(None, error)
        sys.exit(141)
    except KeyboardInterrupt as error:
        _say(Text("stopped."), error)
        _leave(130)
    except SystemExit as error:
        if not getattr(error, "__notes__", None):
            raise
        _say(Text("stopped."), error)
        _leave(error.code if isinstance(error.code, int) else 1)


def _say(text: Text | None, error: BaseException) -> None:
    """On standard error, with what the error's notes tell to do; a terminal that is gone hears nothing."""
    with contextlib.suppress(OSError):
        console = Terminal(stderr=True)
        for line in filter(None, [text, *(Text(printable(note)) for note in getattr(error, "__notes__", []))]):
            console.print(line, soft_wrap=True)


def _leave(code: int) -> NoReturn:
    """At once: all is saved and closed, and a request to a scorer that is still under way would be waited for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)

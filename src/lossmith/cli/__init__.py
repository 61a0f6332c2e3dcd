"""The command `lossmith`, and its subcommands."""

from __future__ import annotations

import ast
import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

import cyclopts
from rich.console import Console
from rich.text import Text

from lossmith import __version__
from lossmith.cli.streams import bear_every_character, check_names
from lossmith.errors import LossmithError, printable

__all__ = ["app", "main"]


def _command(group: cyclopts.App, name: str, function: str, module: str | None = None) -> None:
    """A command that is imported when it is given. Its help is its docstring, read without importing it."""
    file = Path(__file__).with_name(f"{module or name}.py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    group.command(f"lossmith.cli.{file.stem}:{function}", name=name, help=ast.get_docstring(found))


app = cyclopts.App(
    name="lossmith",
    help="Policy learning for RLHF, with a loss that is what its name says.",
    version=__version__,
    suppress_keyboard_interrupt=False,  # main says that it stopped
    default_parameter=cyclopts.Parameter(negative_iterable=()),
)
losses = cyclopts.App(name="losses", help="The catalogue of losses: formulas, weights, parameters, papers.")
reward = cyclopts.App(name="reward", help="Reward models, trained from preferences.")
export = cyclopts.App(name="export", help="A recipe as a folder that another trainer runs.")
app.command(losses)
app.command(reward)
app.command(export)
for _name in ("train", "prefer", "sample", "bench", "annotate", "plot", "replay", "explain", "chat", "merge", "plan"):
    _command(app, _name, _name)
_command(app, "audit", "audit_")
_command(app, "doctor", "doctor_")
_command(app, "report", "report")
_command(app, "init", "init", "project")
_command(app, "status", "status", "project")
_command(losses, "list", "list_", "losses")
_command(losses, "show", "show", "losses")
_command(losses, "compare", "compare", "compare")
_command(losses, "from", "from_", "configurations")
_command(reward, "train", "train", "reward")
_command(export, "verl", "verl", "export")


def _run() -> None:
    """The command. BrokenPipeError: whoever read the output is gone, which rich would call an error of its own."""
    check_names()
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
        console = Console(stderr=True)
        for line in filter(None, [text, *(Text(printable(note)) for note in getattr(error, "__notes__", []))]):
            console.print(line, soft_wrap=True)


def _leave(code: int) -> NoReturn:
    """At once: all is saved and closed, and a request to a scorer that is still under way would be waited for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)

"""The command `lossmith`, and its subcommands."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

import cyclopts
from rich.console import Console
from rich.text import Text

from lossmith import __version__
from lossmith.errors import LossmithError, printable

__all__ = ["app", "main"]

app = cyclopts.App(
    name="lossmith",
    help="Policy learning for RLHF, with a loss that is what its name says.",
    version=__version__,
    default_parameter=cyclopts.Parameter(negative_iterable=()),
    suppress_keyboard_interrupt=False,  # main says what became of the work
)
app.command("lossmith.cli.train:train", name="train")
app.command("lossmith.cli.prefer:prefer", name="prefer")
app.command("lossmith.cli.sample:sample", name="sample")
app.command("lossmith.cli.bench:bench", name="bench")
app.command("lossmith.cli.annotate:annotate", name="annotate")
losses = cyclopts.App(name="losses", help="The catalogue of losses: formulas, weights, parameters, papers.")
losses.command("lossmith.cli.losses:list_", name="list")
losses.command("lossmith.cli.losses:show", name="show")
losses.command("lossmith.cli.compare:compare", name="compare")
app.command(losses)
app.command("lossmith.cli.audit:audit_", name="audit")
reward = cyclopts.App(name="reward", help="Reward models, trained from preferences.")
reward.command("lossmith.cli.reward:train", name="train")
app.command(reward)
app.command("lossmith.cli.plot:plot", name="plot")
app.command("lossmith.cli.project:init", name="init")
app.command("lossmith.cli.project:status", name="status")


def main() -> None:
    """Run the command. An error that Lossmith raised on purpose is one message and exit code 2, not a traceback."""
    try:
        app()
    except LossmithError as error:
        _say(Text.assemble(("error: ", "bold red"), printable(str(error))), error)
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

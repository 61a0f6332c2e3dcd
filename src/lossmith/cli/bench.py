"""`lossmith bench`: how fast a recipe would run on this machine, in a minute or two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lossmith.cli.completion import A_LOSS
from lossmith.cli.streams import print_json
from lossmith.cli.words import settings_of
from lossmith.report.run.bench import as_record, show_measurement
from lossmith.report.run.code import show_code
from lossmith.terminal import Terminal
from lossmith.training import Recipe, measure_recipe, plan

__all__ = ["bench"]


def bench(
    recipe: Path | None = None,
    /,
    *,
    settings: Annotated[Recipe | None, Parameter(name="*", completer=A_LOSS.completer)] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Measure a recipe on this machine: seconds by phase, the floor, memory, and the settings that would be better.

    Takes a minute or two on the default recipe; writes nothing, and trains nothing.

    Parameters
    ----------
    recipe
        A TOML file, as for `lossmith train`; options given here win over it.
    as_json
        Print the measurement as JSON on standard output, everything else on standard error.
    """
    console = Terminal(stderr=as_json)
    made = settings_of(Recipe, recipe, settings)
    show_code(console, scorer=made.scorer, watch=made.watch, loss=made.loss)
    checked = plan(made)
    console.print(checked.report, highlight=False, markup=False, soft_wrap=True)
    with console.status("measuring"):
        found = measure_recipe(checked)
    if as_json:
        print_json(as_record(found))
    else:
        show_measurement(found, console)

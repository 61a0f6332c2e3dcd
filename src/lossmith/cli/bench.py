"""`lossmith bench`: how fast a recipe would run on this machine, in about a minute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from lossmith.report.bench import as_record, show_measurement
from lossmith.report.code import show_code
from lossmith.training import Recipe, measure_recipe, plan

__all__ = ["bench"]


def bench(
    recipe: Path | None = None,
    /,
    *,
    settings: Annotated[Recipe | None, Parameter(name="*")] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Measure a recipe on this machine: seconds by phase, the floor, memory, and the settings that would be better.

    Takes about a minute on the default recipe; writes nothing, and trains nothing.

    Parameters
    ----------
    recipe
        A TOML file, as for `lossmith train`; options given here win over it.
    as_json
        Print the measurement as JSON on standard output, everything else on standard error.
    """
    console = Console(stderr=as_json)
    given = {} if settings is None else {k: getattr(settings, k) for k in settings.model_fields_set}
    fields = {} if recipe is None else Recipe.read(recipe)
    made = Recipe.make(str(recipe or "command line"), **fields | given)
    show_code(console, scorer=made.scorer, watch=made.watch, loss=made.loss)
    checked = plan(made)
    with console.status("measuring"):
        found = measure_recipe(checked)
    if as_json:
        print(json.dumps(as_record(found)))
    else:
        show_measurement(found, console)

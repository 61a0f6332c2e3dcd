"""`lossmith train`: the whole loop on a real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from lossmith.api import resume as resume_run
from lossmith.api import run_recipe
from lossmith.errors import RecipeError
from lossmith.training import Recipe

__all__ = ["train"]


def train(
    recipe: Path | None = None,
    /,
    *,
    settings: Annotated[Recipe | None, Parameter(name="*")] = None,
    resume: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Train a policy on prompts without gold answers, and show that held-out performance rose.

    With no argument: SmolLM2-135M-Instruct, the shipped prompts, an automatic helpfulness scorer; about five minutes.

    Parameters
    ----------
    recipe
        A TOML file that sets any of the options below; options given here win over it.
    resume
        A run folder to go on with from its last checkpoint.
    as_json
        Print the summary as JSON on standard output, everything else on standard error.
    """
    console = Console(stderr=as_json)
    given = {} if settings is None else {k: getattr(settings, k) for k in settings.model_fields_set}
    if resume is not None:
        if recipe is not None or given:
            raise RecipeError(
                "--resume goes on with the recipe of its run folder: give no other recipe or option with it."
            )
        run = resume_run(resume, console=console)
    else:
        fields = {} if recipe is None else Recipe.read(recipe)
        run = run_recipe(Recipe.make(str(recipe or "command line"), **fields | given), console=console)
    if as_json:
        print(json.dumps(run.summary | {"folder": str(run.folder.path)}))

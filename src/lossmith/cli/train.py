"""`lossmith train`: the whole loop on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from lossmith.api import resume as resume_run
from lossmith.api import run_recipe
from lossmith.cli.streams import print_json
from lossmith.cli.words import settings_of
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
    if resume is not None:
        if recipe is not None or settings is not None:
            raise RecipeError(
                "--resume goes on with the recipe of its run folder: give no other recipe or option with it."
            )
        run = resume_run(resume, console=console)
    else:
        run = run_recipe(settings_of(Recipe, recipe, settings), console=console)
    if as_json:
        print_json(run.summary | {"folder": str(run.folder.path)})

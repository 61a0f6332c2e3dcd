"""`lossmith train`: the whole loop on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lossmith.api import resume as resume_run
from lossmith.api import run_recipe
from lossmith.cli.completion import A_LOSS
from lossmith.cli.streams import RunConsole, print_json
from lossmith.cli.words import settings_of
from lossmith.errors import FinishedError, RecipeError
from lossmith.training import Recipe

__all__ = ["train"]


def train(
    recipe: Path | None = None,
    /,
    *,
    settings: Annotated[Recipe | None, Parameter(name="*", completer=A_LOSS.completer)] = None,
    resume: Path | None = None,
    accept_changes: Annotated[bool, Parameter(negative="")] = False,
    ranks: int = 1,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Train a policy on prompts without gold answers, and show that held-out performance rose.

    With no argument: SmolLM2-135M-Instruct, the shipped prompts, an automatic helpfulness scorer; minutes on a laptop.

    Parameters
    ----------
    recipe
        A TOML file that sets any of the options below; options given here win over it.
    resume
        A run folder to go on with from its last checkpoint; with --steps, to as many steps as that.
    accept_changes
        With --resume: go on although the recipe, the prompts, the scorer or the model are not what they were.
    ranks
        Processes on this machine that share the work, each with a copy of the model (or, with --shard, its part of
        one): on its own GPU, or its share of the processor's cores. Over several machines: torchrun
        (docs/many-processes.md).
    as_json
        Print the summary as JSON on standard output, everything else on standard error.
    """
    console = RunConsole(stderr=as_json)
    if ranks < 1:
        raise RecipeError(f"--ranks {ranks}: a run has at least one process.")
    if resume is not None:
        given = set() if settings is None else settings.model_fields_set
        if recipe is not None or given - {"steps"}:
            raise RecipeError(
                "--resume goes on with the recipe of its run folder: of recipes and other options, only --steps (more "
                "of them) and --accept-changes go with it."
            )
        try:
            steps = settings.steps if settings is not None and given else None
            run = resume_run(resume, steps=steps, accept_changes=accept_changes, console=console, processes=ranks)
        except FinishedError as done:
            console.print(str(done), soft_wrap=True, highlight=False, markup=False)
            if as_json:
                print_json(done.summary | {"folder": str(resume)})
            return
    elif accept_changes:
        raise RecipeError("--accept-changes goes with --resume: a new run has nothing that could have changed.")
    else:
        run = run_recipe(settings_of(Recipe, recipe, settings), console=console, processes=ranks)
    if as_json:
        print_json(run.summary | {"folder": str(run.folder.path)})

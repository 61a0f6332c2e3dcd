"""`lossmith prefer`: a policy straight from preferences, without a reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lossmith.api import resume_preferences, run_preferences
from lossmith.cli.completion import A_LOSS
from lossmith.cli.streams import RunConsole, print_json
from lossmith.cli.words import settings_of
from lossmith.errors import FinishedError, RecipeError
from lossmith.report.run.code import show_code
from lossmith.training.offline.loop import PreferenceRecipe

__all__ = ["prefer"]


def prefer(
    preferences: str | None = None,
    /,
    *,
    settings: Annotated[PreferenceRecipe | None, Parameter(name="*", completer=A_LOSS.completer)] = None,
    recipe: Path | None = None,
    resume: Path | None = None,
    accept_changes: Annotated[bool, Parameter(negative="")] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Train a policy on preferences: DPO, IPO, KTO and their kin, without a reward model.

    Parameters
    ----------
    preferences
        A preferences file (pairs, rankings, ratings or labels), or a database of judgements (.db).
    recipe
        A TOML file that sets any of the options below; options given here win over it.
    resume
        A run folder to go on with from its last checkpoint.
    accept_changes
        With --resume: go on although the recipe, the preferences, the loss or the model are not what they were.
    as_json
        Print the summary as JSON on standard output, everything else on standard error.
    """
    console = RunConsole(stderr=as_json)
    given = settings is not None and settings.model_fields_set
    if resume is not None and (preferences is not None or recipe is not None or given):
        raise RecipeError(
            "--resume goes on with the recipe of its run folder: of all other options, only --accept-changes goes with "
            "it."
        )
    if resume is None and accept_changes:
        raise RecipeError("--accept-changes goes with --resume: a new run has nothing that could have changed.")
    try:
        if resume is not None:
            run = resume_preferences(resume, accept_changes=accept_changes, console=console)
        else:
            made = settings_of(
                PreferenceRecipe, recipe, settings, preferences=preferences,
                first=lambda fields: show_code(console, loss=fields.get("loss")),
            )  # fmt: skip
            run = run_preferences(made, console)
    except FinishedError as done:
        console.print(str(done), soft_wrap=True, highlight=False, markup=False)
        if as_json:
            print_json(done.summary | {"folder": str(resume)})
        return
    if as_json:
        print_json(run.summary | {"folder": str(run.folder.path)})

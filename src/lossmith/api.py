"""Training, from Python: what `lossmith train` and `lossmith prefer` do.

The other commands are functions too: `sample_outputs`, `lossmith.feedback` (annotate), `train_reward_model`, `audit`,
`compare`, `measure_recipe` (bench), `plot_frontier`, `doctor`, `write_report` and `Project` (init, status). All are in
`lossmith`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tomli_w
from rich.console import Console

from lossmith.cluster import ClusterRun, Placement, supervise
from lossmith.durable.inputs import Inputs
from lossmith.durable.stopping import Stopping
from lossmith.errors import RecipeError, RunError
from lossmith.files import at_home
from lossmith.project import check_recipe_order
from lossmith.ranks import Ranks, of_environment, started
from lossmith.report.run.code import show_code
from lossmith.report.run.offline import show_preference_run
from lossmith.report.run.tracking import check_tracker
from lossmith.running import GoOn, kept, make_run
from lossmith.terminal import Terminal
from lossmith.training import Recipe, Run, plan
from lossmith.training.going_on import command_of, is_finished, recipe_of
from lossmith.training.offline import loop as offline
from lossmith.training.offline.loop import PreferenceRecipe, PreferenceRun
from lossmith.training.prepare import work_for
from lossmith.training.run import RunFolder

__all__ = [
    "prefer",
    "resume",
    "resume_on_cluster",
    "resume_preferences",
    "run_on_cluster",
    "run_preferences",
    "run_recipe",
    "train",
    "train_on_cluster",
]


def train(*, quiet: bool = False, **settings: Any) -> Run:
    """Train a policy and return its run.

    settings: the fields of a recipe (`lossmith train --help` lists them). `scorer` may be a Python function,
    `loss` a PolicyLoss, `prompts` a list: train(scorer=my_function, loss=get_loss("rloo"), prompts=["..."], steps=20).
    Raises RecipeError, LossError, PromptError, ScorerError or PolicyError before the model is loaded where it can.
    Whatever ends it early, Ctrl-C and SIGTERM included, the run is saved first: a note of the exception says how to
    go on.
    """
    return run_recipe(Recipe.make("train()", **settings), console=Terminal(quiet=quiet))


def resume(
    folder: str | Path,
    *,
    steps: int | None = None,
    accept_changes: bool = False,
    console: Console | None = None,
    processes: int = 1,
    **objects: Any,
) -> Run:
    """Go on with a run that stopped, from its last complete checkpoint, as if it had not stopped.

    steps: how many there are to be, where they are more than the run had. processes: ranks that share the work, as many
    as you like whatever the run had. objects: `scorer`, `watch` or `prompts` that were Python objects, which no file
    can hold. RunError: the run is finished; what decided it has changed, and accept_changes is not set; another
    process works on it.
    """
    ranks, more = of_environment(), {} if steps is None else {"steps": steps}
    if ranks.rank:  # rank 0 alone works in the folder
        return run_recipe(recipe_of(RunFolder(at_home(folder)), Recipe, objects, more), ranks=ranks)
    there = RunFolder.existing(at_home(folder))
    try:
        recipe, resume = _resumed(there, objects, more, accept_changes)
        return run_recipe(recipe, resume=resume, console=console, processes=processes)
    finally:
        there.close()


def _resumed(
    there: RunFolder, objects: dict[str, Any], more: dict[str, Any], accept_changes: bool
) -> tuple[Recipe, GoOn]:
    """The recipe of a run that stopped, and how it is gone on with."""
    recipe = recipe_of(there, Recipe, objects, more)
    _check_more(there, recipe)
    return recipe, GoOn.of(there.path, accept_changes, bool(more))


def _check_more(folder: RunFolder, recipe: Recipe) -> None:
    """RunError: the run has that many steps already."""
    known = Inputs.read(folder.path)
    had = recipe.steps if known is None else known.settings.get("steps", recipe.steps)
    if recipe.steps < had:
        raise RunError(f"steps = {recipe.steps}, but the run {str(folder.path)!r} was begun with {had}; give more.")
    is_finished(folder, recipe.steps, f" For more steps: {command_of(recipe, folder)} --steps {2 * recipe.steps}")


def run_recipe(
    recipe: Recipe,
    *,
    resume: GoOn | None = None,
    console: Console | None = None,
    processes: int = 1,
    ranks: Ranks | None = None,
) -> Run:
    """Do all that a recipe asks, showing it on the console.

    resume: a run to go on with. processes: ranks that share the work on this machine, this one among them. ranks: those
    that this process is one of; by default those that torchrun has started. On any other than rank 0 the call does that
    rank's share and ends the process with it (SystemExit).
    """
    if processes > 1:
        with tempfile.TemporaryDirectory() as place, started(processes, ["train", _written(recipe, place)]) as those:
            return run_recipe(recipe, resume=resume, console=console, ranks=those)
    ranks = ranks or of_environment()
    console = console or Terminal()
    if recipe.max_staleness:
        raise RecipeError(
            f"max_staleness = {recipe.max_staleness} lets samplers run ahead of the learner, and in one process the "
            "model that learns writes the completions itself. Train on a cluster (--cluster ray; train_on_cluster in "
            "Python), or set it to 0."
        )
    _check_first(recipe)
    if recipe.engine == "trl":
        from lossmith.adapters.trl import engine

        engine.check_recipe(recipe)
    if ranks.rank:
        work_for(plan(recipe), ranks)
        raise SystemExit(0)
    show_code(console, scorer=recipe.scorer, watch=recipe.watch, loss=recipe.loss)
    checked = plan(recipe, None if resume is None else resume.held_out_ids)
    return make_run(checked, console, resume=resume, ranks=ranks)


def _check_first(recipe: Recipe) -> None:
    """What can be refused before anything is read."""
    check_recipe_order(recipe)
    check_tracker(recipe.track)


def train_on_cluster(placement: Placement | None = None, *, quiet: bool = False, **settings: Any) -> ClusterRun:
    """Train a policy with samplers, scorers and learner in processes of their own, placed by Ray (pip install ray).

    placement: how many of each. settings: those of `train`, none of them a live Python object. The cluster is the one
    that RAY_ADDRESS names, or one of this machine alone. RecipeError, RunError: as `train`; also, there is no Ray, or
    too little for the placement.
    """
    recipe = Recipe.make("train_on_cluster()", **settings)
    return run_on_cluster(recipe, placement or Placement(), console=Terminal(quiet=quiet))


def resume_on_cluster(
    folder: str | Path,
    placement: Placement | None = None,
    *,
    steps: int | None = None,
    accept_changes: bool = False,
    console: Console | None = None,
) -> ClusterRun:
    """Go on with a run that stopped, on a cluster or not, with samplers, scorers and learner placed by Ray."""
    there = RunFolder.existing(at_home(folder))
    try:
        recipe, resume = _resumed(there, {}, {} if steps is None else {"steps": steps}, accept_changes)
    finally:
        there.close()  # the learner works in it
    return run_on_cluster(recipe, placement or Placement(), resume=resume, console=console)


def run_on_cluster(
    recipe: Recipe, placement: Placement, *, resume: GoOn | None = None, console: Console | None = None
) -> ClusterRun:
    """Do all that a recipe asks on a cluster, showing it on the console."""
    console = console or Terminal()
    _check_first(recipe)
    show_code(console, scorer=recipe.scorer, watch=recipe.watch, loss=recipe.loss)
    return supervise(plan(recipe, None if resume is None else resume.held_out_ids), placement, console, resume)


def _written(recipe: Recipe, place: str) -> str:
    """A file of the recipe, for the other ranks. RecipeError: it holds what no file can."""
    live = recipe.in_memory()
    if live:
        raise RecipeError(
            f"{', '.join(live)} cannot be given to processes that are yet to be started: they are Python objects. "
            "Start your script with torchrun, or write them where they are to be found."
        )
    file = Path(place) / "recipe.toml"
    file.write_text(tomli_w.dumps(recipe.written()), encoding="utf-8")
    return str(file)


def prefer(preferences: Any = None, *, quiet: bool = False, **settings: Any) -> PreferenceRun:
    """Train a policy straight from preferences (DPO and its kin) and return its run.

    preferences: a file, a database of judgements, or a list. settings: the other fields of a PreferenceRecipe
    (`lossmith prefer --help` lists them): prefer("pairs.jsonl", loss="dpo"). Errors and rescue are those of `train`.
    """
    if preferences is not None:
        settings["preferences"] = preferences
    return run_preferences(PreferenceRecipe.make("prefer()", **settings), Terminal(quiet=quiet))


def resume_preferences(
    folder: str | Path, *, accept_changes: bool = False, console: Console | None = None, **objects: Any
) -> PreferenceRun:
    """Go on with a run of `prefer` from its last complete checkpoint, as `resume` does with one of `train`.

    objects: `preferences` that were a Python object, which no file can hold.
    """
    with Stopping() as stop:
        run = offline.resume_preferences(folder, accept_changes=accept_changes, **objects)
        with kept(run, stop):
            show_preference_run(run, console or Terminal(), stop)
    return run


def run_preferences(recipe: PreferenceRecipe, console: Console) -> PreferenceRun:
    """Do all that a recipe on preferences asks, showing it on the console."""
    check_tracker(recipe.track)
    if of_environment().size > 1:
        raise RunError("lossmith prefer works in one process: start it without torchrun.")
    with Stopping() as stop:
        checked = offline.plan_preferences(recipe)
        with console.status("reading the preferences into the model's tokens"):
            run = offline.open_preferences(checked)
        with kept(run, stop):
            show_preference_run(run, console, stop)
    return run

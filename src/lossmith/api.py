"""Training, from Python: what `lossmith train` and `lossmith prefer` do.

The other commands are functions too: `sample_outputs`, `lossmith.feedback` (annotate), `train_reward_model`, `audit`,
`compare`, `measure_recipe` (bench), `plot_frontier`, `doctor`, `write_report` and `Project` (init, status). All are in
`lossmith`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
from rich.console import Console

from lossmith.durable.inputs import Inputs
from lossmith.durable.stopping import Stopping
from lossmith.errors import LossmithError, RecipeError, RunError
from lossmith.files import at_home
from lossmith.project import check_recipe_order
from lossmith.ranks import Ranks, of_environment, started
from lossmith.report.run.closing import closing
from lossmith.report.run.code import show_code
from lossmith.report.run.live import LiveView
from lossmith.report.run.offline import show_preference_run
from lossmith.report.run.opening import opening
from lossmith.report.run.tracking import Tracking, check_tracker
from lossmith.terminal import Terminal
from lossmith.training import Plan, Recipe, Run, Step, learn, open_run, plan
from lossmith.training.going_on import command_of, is_finished, recipe_of
from lossmith.training.keeping import Keeping
from lossmith.training.loop import work_for
from lossmith.training.offline import loop as offline
from lossmith.training.offline.loop import PreferenceRecipe, PreferenceRun
from lossmith.training.run import RunFolder

__all__ = ["kept", "prefer", "resume", "resume_preferences", "run_preferences", "run_recipe", "train"]


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
        recipe = recipe_of(there, Recipe, objects, more)
        _check_more(there, recipe)
        known = Inputs.read(there.path)
        return run_recipe(
            recipe,
            folder=there.path,
            held_out_ids=None if known is None else known.known.get("held_out"),
            console=console,
            accept_changes=accept_changes,
            more_steps=steps is not None,
            processes=processes,
        )
    finally:
        there.close()


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
    folder: Path | None = None,
    held_out_ids: list[str] | None = None,
    console: Console | None = None,
    accept_changes: bool = False,
    more_steps: bool = False,
    processes: int = 1,
    ranks: Ranks | None = None,
) -> Run:
    """Do all that a recipe asks, showing it on the console; `folder` is a run to go on with.

    processes: ranks that share the work on this machine, this one among them. ranks: those that this process is one
    of; by default those that torchrun has started. On any other than rank 0 the call does that rank's share and ends
    the process with it (SystemExit).
    """
    if processes > 1:
        with tempfile.TemporaryDirectory() as place, started(processes, ["train", _written(recipe, place)]) as those:
            return run_recipe(
                recipe, folder=folder, held_out_ids=held_out_ids, console=console, accept_changes=accept_changes,
                more_steps=more_steps, ranks=those,
            )  # fmt: skip
    ranks = ranks or of_environment()
    console = console or Terminal()
    check_recipe_order(recipe)
    check_tracker(recipe.track)
    if recipe.engine == "trl":
        from lossmith.adapters.trl import engine

        engine.check_recipe(recipe)
    if ranks.rank:
        work_for(plan(recipe), ranks)
        raise SystemExit(0)
    show_code(console, scorer=recipe.scorer, watch=recipe.watch, loss=recipe.loss)
    checked = plan(recipe, held_out_ids)
    with Stopping() as stop:
        run = open_run(checked, resume=folder, accept_changes=accept_changes, more_steps=more_steps, ranks=ranks)
        with kept(run, stop):
            _show_run(checked, run, console, stop)
    return run


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


def _show_run(checked: Plan, run: Run, console: Console, stop: Stopping) -> None:
    """The run from its opening to its closing words."""
    console.print(opening(checked, run), highlight=False, soft_wrap=True, markup=False)
    with LiveView(run, console) as view:
        run.start()
        for note in run.going_on.notes:
            console.print("note      " + note, highlight=False, soft_wrap=True, markup=False)
        with Tracking(run, console) as tracking:
            _show_steps(run, view, tracking, stop)
            view.end()
            run.finish()
            tracking.end(run.summary["held_out"])
    closing(run, run.summary, console)


def _show_steps(run: Run, view: LiveView, tracking: Tracking, stop: Stopping) -> None:
    view.begin()

    def shown(step: Step) -> None:
        view.show(step)
        tracking.step(step.record)
        stop.check()

    if run.recipe.engine == "trl":
        from lossmith.adapters.trl import engine

        engine.learn(run, shown)
    else:
        for step in learn(run):
            shown(step)


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


@contextlib.contextmanager
def kept(run: Keeping, stop: Stopping) -> Iterator[None]:
    """Whatever ends the block early, a signal or an error, the run is saved, and a note of it says how to go on."""
    stop.busy = lambda: run.busy
    try:
        yield
    except BaseException as error:
        error.add_note(_rescue(run, stop))
        raise
    finally:
        run.close()


def _rescue(run: Keeping, stop: Stopping) -> str:
    """Save what can be saved; what there is to go on with, in words."""
    failed = ""
    if run.learner.settled and not stop.at_once:
        try:
            run.save()
        except (LossmithError, KeyboardInterrupt) as error:
            failed = str(error) or "It was not saved: you left at once."
    if run.summary:
        return f"The run is finished: {run.folder.path}"
    where = f"saved after step {run.saved} of {run.steps}" if run.saved else "no step saved: it begins with the first"
    return " ".join(filter(None, [failed, f"The run is {where}. Go on with: {how_to_go_on(run)}"]))


def how_to_go_on(run: Keeping) -> str:
    """The command; where a file cannot hold all of the run, the call."""
    live = run.recipe.in_memory()
    if live:
        return f"{run.recipe.resumed_in_python}({str(run.folder.path)!r}, {', '.join(f'{key}=...' for key in live)})"
    return command_of(run.recipe, run.folder)

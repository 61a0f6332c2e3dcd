"""Everything the command line does, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from lossmith.errors import RecipeError
from lossmith.project import check_recipe_order
from lossmith.report.closing import closing
from lossmith.report.code import show_code
from lossmith.report.live import LiveView
from lossmith.report.opening import opening
from lossmith.rewards import close_scorer
from lossmith.training import Recipe, Run, learn, open_run, plan

__all__ = ["resume", "run_recipe", "train"]


def train(*, quiet: bool = False, **settings: Any) -> Run:
    """Train a policy and return its run.

    settings: the fields of a recipe (`lossmith train --help` lists them). `scorer` may be a Python function,
    `loss` a PolicyLoss, `prompts` a list: train(scorer=my_function, loss=get_loss("rloo"), prompts=["..."], steps=20).
    Raises RecipeError, LossError, PromptError, ScorerError or PolicyError before the model is loaded where it can.
    """
    return run_recipe(Recipe.make("train()", **settings), console=Console(quiet=quiet))


def resume(folder: str | Path, *, console: Console | None = None) -> Run:
    """Go on with a run that stopped, from its last complete checkpoint, as if it had not stopped."""
    path = Path(folder)
    if not (path / "recipe.toml").exists():
        raise RecipeError(f"{str(folder)!r} is not a run folder: it holds no recipe.toml.")
    fields = Recipe.read(path / "recipe.toml")
    for key in ("scorer", "watch", "prompts"):
        if str(fields.get(key, "")).startswith("python: "):
            raise RecipeError(
                f"{path / 'recipe.toml'}: the run's {key} was a Python object ({fields[key]}), which a file cannot "
                "hold. Write its importable path there, as module:function or a file."
            )
    return run_recipe(Recipe.make(str(path / "recipe.toml"), **fields), folder=path, console=console)


def run_recipe(recipe: Recipe, *, folder: Path | None = None, console: Console | None = None) -> Run:
    """Do all that a recipe asks, showing it on the console; `folder` is a run to go on with."""
    console = console or Console()
    check_recipe_order(recipe)
    show_code(console, scorer=recipe.scorer, watch=recipe.watch, loss=recipe.loss)
    checked = plan(recipe)
    run = open_run(checked, resume=folder)
    try:
        console.print(opening(checked, run), highlight=False, soft_wrap=True, markup=False)
        with LiveView(run, console) as view:
            run.start()
            view.begin()
            for step in learn(run):
                view.show(step)
            view.end()
            run.finish()
    finally:
        close_scorer(run.scorer)
        close_scorer(run.watch)
    closing(run, run.summary, console)
    return run

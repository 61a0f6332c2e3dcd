"""`lossmith reward train`: a reward model from preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lossmith.cli.streams import RunConsole, print_json
from lossmith.cli.words import settings_of
from lossmith.project import check_order
from lossmith.report.run.waiting import Busy
from lossmith.reward_model.recipe import RewardRecipe
from lossmith.reward_model.train import train_reward_model

__all__ = ["train"]


def train(
    preferences: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    settings: Annotated[RewardRecipe | None, Parameter(name="*")] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Train a reward model from preferences, measure it on held-out prompts, and freeze it.

    Parameters
    ----------
    preferences
        A preferences file (pairs, rankings, ratings or labels), or a judgement database (.db).
    output
        Folder of the reward model; never overwritten. What there is when it stops stays in FOLDER.partial, and the
        same command goes on with it.
    as_json
        Print the manifest as JSON on standard output, everything else on standard error.
    """
    recipe = settings_of(RewardRecipe, None, settings)
    check_order("reward", preferences, output)
    console = RunConsole(stderr=as_json)
    with Busy(console) as busy:

        def say(line: str) -> None:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
            busy.told()

        busy.about("reward model")
        manifest = train_reward_model(preferences, output, recipe, say, busy)
    console.print(f"frozen in {output}; the plots: {output / 'report.svg'}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(manifest)

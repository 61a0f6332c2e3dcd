"""`lossmith reward train`: a reward model from preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lossmith.cli.streams import RunConsole, print_json
from lossmith.project import check_order
from lossmith.report.run.waiting import Busy
from lossmith.reward_model.train import RewardRecipe, train_reward_model

__all__ = ["train"]


def train(
    preferences: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    model: str = "default",
    form: Literal["pairs", "rankings", "ratings", "labels"] | None = None,
    loss: Literal["auto", "bradley_terry", "plackett_luce", "all_pairs", "mean_squared", "logistic"] = "auto",
    centring: float = 0.01,
    epochs: int = 2,
    comparisons_per_step: int = 8,
    learning_rate: float = 2e-5,
    train_layers: int | None = None,
    held_out: float = 0.2,
    ensemble: int = 1,
    ensemble_by: Literal["seeds", "subsets"] = "seeds",
    combine: Literal["mean", "worst", "uncertain"] = "mean",
    penalty: float = 1.0,
    normalise: bool = True,
    max_length: int | None = None,
    skip_bad: bool = False,
    checkpoint_minutes: float = 1.0,
    micro_batch_tokens: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
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
    model
        Where its body comes from: 'default' (SmolLM2-135M-Instruct), a folder, or a hub name.
    form
        What a database's judgements are turned into; by itself what keeps most of them.
    loss
        auto: Plackett-Luce for rankings, Bradley-Terry for pairs, squares for ratings, logistic for labels.
    centring
        Weight of the term that puts zero in the middle of what is compared.
    epochs
        Passes over the preferences.
    comparisons_per_step
        Preferences in one optimiser step.
    learning_rate
        AdamW's learning rate.
    train_layers
        Train the last so many layers and the head only: faster, and less memory.
    held_out
        Share (or number) of the prompts that the figures are measured on.
    ensemble
        Members; more than one makes an ensemble.
    ensemble_by
        Members differ by seed, or also by the prompts they see.
    combine
        An ensemble's score: mean, worst, or uncertain (mean - penalty x variance).
    penalty
        Of `uncertain`.
    normalise
        Give scores in units of their spread over the training texts.
    max_length
        Tokens of the longest text; longer ones are refused.
    skip_bad
        Leave out texts that are too long, and count them.
    checkpoint_minutes
        Minutes between checkpoints, more where saving takes over 3% of the time; 0 for none but when it stops.
    micro_batch_tokens
        Tokens in one forward and backward pass; changes no result.
    seed
        Decides split, order and the new head.
    device
        auto, cpu, cuda, mps, ...
    dtype
        Compute type: auto, float32 or bfloat16.
    as_json
        Print the manifest as JSON on standard output, everything else on standard error.
    """
    given = locals()
    fields = {key: given[key] for key in RewardRecipe.__dataclass_fields__}
    check_order("reward", preferences, output)
    console = RunConsole(stderr=as_json)
    with Busy(console) as busy:

        def say(line: str) -> None:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
            busy.told()

        busy.about("reward model")
        manifest = train_reward_model(preferences, output, RewardRecipe(**fields), say, busy)
    console.print(f"frozen in {output}; the plots: {output / 'report.svg'}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(manifest)

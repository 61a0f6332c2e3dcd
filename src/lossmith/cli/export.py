"""`lossmith export verl`: a recipe as a folder that another trainer runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lossmith.adapters.verl_export import export
from lossmith.cli.words import settings_of
from lossmith.terminal import Terminal
from lossmith.training import Recipe

__all__ = ["verl"]


def verl(
    recipe: Path | None = None,
    /,
    *,
    settings: Annotated[Recipe | None, Parameter(name="*")] = None,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    gpus: int = 1,
    max_prompt_tokens: int = 1024,
) -> None:
    """Write a recipe as a folder that verl trains from: its configuration, data, reward function, loss and command.

    Parameters
    ----------
    recipe
        A TOML file that sets any of the options below; options given here win over it.
    output
        The folder, new or empty.
    gpus
        GPUs of the one node.
    max_prompt_tokens
        Longest prompt, in tokens.
    """
    folder = export(settings_of(Recipe, recipe, settings), output, gpus=gpus, max_prompt_tokens=max_prompt_tokens)
    Terminal().print(f"written to {folder}; it trains with {folder / 'launch.sh'}", highlight=False, soft_wrap=True)

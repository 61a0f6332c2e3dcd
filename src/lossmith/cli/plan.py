"""`lossmith plan`: what a recipe takes on GPUs that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from lossmith.cli.streams import print_json
from lossmith.cli.words import settings_of
from lossmith.report.run.planned import as_record, show_plan
from lossmith.training import Recipe
from lossmith.training.hardware import Gpus, plan_hardware

__all__ = ["plan"]


def plan(
    recipe: Path | None = None,
    *,
    settings: Annotated[Recipe | None, Parameter(name="*")] = None,
    gpus: int = 1,
    gpu_memory: float = 80.0,
    prompt_tokens: int = 256,
    tflops: float = Gpus.tflops,
    bandwidth: float = Gpus.bandwidth_gb,
    link: float = Gpus.link_gb,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Plan a recipe for GPUs that are not here: memory by part, the split, what crosses between them, time a step.

    Of the model (--model: default, a folder, a config.json, or a hub name) the configuration alone is read.

    Parameters
    ----------
    recipe
        A TOML file, as for `lossmith train`; options given here win over it.
    gpus
        How many there are.
    gpu_memory
        GB of each.
    prompt_tokens
        Tokens of the longest prompt.
    tflops
        10^12 operations a second that a GPU's bfloat16 products reach at best.
    bandwidth
        GB a second that a GPU reads from its memory.
    link
        GB a second from a GPU to the others.
    as_json
        Print the plan as JSON.
    """
    made = settings_of(Recipe, recipe, settings)
    found = plan_hardware(made, Gpus(gpus, gpu_memory, tflops, bandwidth, link), prompt_tokens=prompt_tokens)
    if as_json:
        print_json(as_record(found))
    else:
        Console().print(show_plan(found), highlight=False, markup=False, soft_wrap=True)

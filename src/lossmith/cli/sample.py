"""`lossmith sample`: output sets of prompts, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lossmith.cli.streams import write_lines
from lossmith.feedback.output_set import json_line
from lossmith.outputs import sample_outputs
from lossmith.policy.text import SpecialTokens

__all__ = ["sample"]


def sample(
    prompts: str = "default",
    /,
    *,
    prompt: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    n: int = 1,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    model: str = "default",
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    special_tokens: SpecialTokens = "answer",
    chat_template: str | None = None,
    seed: int = 0,
    resample: int = 3,
    best_by: str | None = None,
    limit: int | None = None,
    prompt_column: str = "prompt",
    pass_columns: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Sample a set of different outputs for each prompt, and write the sets as JSON lines.

    Parameters
    ----------
    prompts
        'default', a file, a datasets folder, or a hub name.
    prompt
        The text of a prompt, instead of a file; again for each further one.
    n
        Outputs of each prompt.
    output
        File to write; standard output if not given. An existing file is not overwritten. What is there when it stops
        stays in FILE.partial, and the same command goes on with the rest.
    model
        'default' (SmolLM2-135M-Instruct), a folder (a run's policy/, say), or a hub name.
    max_tokens
        Token budget of a completion.
    temperature
        Sampling temperature; 0 takes the likeliest token.
    top_p
        Nucleus: the smallest set of tokens with this probability; 1 is off.
    top_k
        Only the k likeliest tokens; 0 is off.
    stop
        Strings that end a completion, special tokens among them.
    special_tokens
        Special tokens that a text shows: those that are part of the answer (<think>, tool calls), all, or none.
    chat_template
        Which of the model's chat templates, where it has several.
    seed
        Decides what is sampled, whatever the order of the prompts.
    resample
        How often outputs that are nearly the same as another of their set are drawn again.
    best_by
        A scorer: of the n outputs of each prompt, keep the one that it scores highest (best of n).
    limit
        Use only this many prompts.
    prompt_column
        Column that holds the prompt.
    pass_columns
        Target-like columns to tolerate in the file.
    device
        auto, cpu, cuda, mps, ...
    dtype
        Compute type: auto, float32 or bfloat16.
    """
    rows = sample_outputs(**locals())
    if output is None:
        write_lines([json_line(row) for row in rows])

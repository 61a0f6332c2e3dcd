"""`lossmith sample`: completions of prompts, without training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from lossmith import policy as policies
from lossmith.errors import RunError
from lossmith.policy import SamplingSettings, check_model, check_samples, load_policy
from lossmith.prompts import default_prompts_path, load_prompts
from lossmith.rollouts import Rollout

__all__ = ["sample"]


def sample(
    prompts: str = "default",
    /,
    *,
    n: int = 1,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    model: str = "default",
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    seed: int = 0,
    limit: int | None = None,
    prompt_column: str = "prompt",
    pass_columns: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Sample completions of prompts and write them as JSON lines.

    Parameters
    ----------
    prompts
        'default', a file, a datasets folder, or a hub name.
    n
        Completions of each prompt.
    output
        File to write; standard output if not given. An existing file is not overwritten.
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
        Strings that end a completion.
    seed
        Decides what is sampled, whatever the order of the prompts.
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
    settings = SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, stop=stop)
    check_samples(n, settings)
    if output is not None and output.exists():
        raise RunError(f"{output} exists, and is not overwritten. Choose another file with -o.")
    source = default_prompts_path() if prompts == "default" else prompts
    chosen = load_prompts(source, column=prompt_column, pass_columns=pass_columns, limit=limit)
    check_model(model)
    policy = load_policy(model, device=device, compute_dtype=dtype)
    console = Console(stderr=True)
    with console.status(f"sampling {len(chosen)} x {n} completions"):
        rollouts = policies.sample(policy, list(chosen), n, settings, seed=seed, step=0)
    lines = "".join(json.dumps(_row(r, model, seed), ensure_ascii=False) + "\n" for r in rollouts)
    if output is None:
        sys.stdout.write(lines)
    else:
        output.write_text(lines, encoding="utf-8")
        console.print(f"{len(rollouts)} completions of {len(chosen)} prompts written to {output}", highlight=False)


def _row(rollout: Rollout, model: str, seed: int) -> dict:
    measure = rollout.behavior_logp.measure
    return {
        "prompt": rollout.prompt.content if isinstance(rollout.prompt.content, str) else list(rollout.prompt.messages),
        "prompt_id": rollout.prompt.id,
        "sample": rollout.sample,
        "completion": rollout.completion,
        "finish_reason": rollout.finish_reason,
        "tokens": list(rollout.completion_ids),
        "behavior_logp": [round(x, 6) for x in rollout.behavior_logp.values.tolist()],
        "model": model,
        "policy_version": measure.policy_version,
        "temperature": measure.temperature,
        "top_p": measure.top_p,
        "top_k": measure.top_k,
        "seed": seed,
    }

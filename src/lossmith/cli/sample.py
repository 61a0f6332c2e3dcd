"""`lossmith sample`: output sets of prompts, without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from lossmith import policy as policies
from lossmith.cli.streams import write_lines
from lossmith.errors import PolicyError
from lossmith.feedback.distinct import sample_sets
from lossmith.feedback.output_set import OutputSet, json_line, set_of_rollouts, write_sets
from lossmith.files import check_writable
from lossmith.policy import Policy, SamplingSettings, check_model, check_samples, load_policy
from lossmith.policy.text import SpecialTokens
from lossmith.project import check_order
from lossmith.prompts import Prompt, default_prompts_path, load_prompts
from lossmith.report.code import show_code
from lossmith.report.prompts import who_reads
from lossmith.report.waiting import waiting
from lossmith.rewards import check_scorer, close_scorer, load_scorer
from lossmith.rewards.address import shown
from lossmith.rewards.best_of import best_of
from lossmith.rewards.weak import doubts

__all__ = ["sample"]

AT_MOST = 1_000_000  # outputs: they are held in memory until all are there


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
    n
        Outputs of each prompt.
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
    settings = SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, stop=stop)
    check_samples(n, settings)
    check_order("sample", prompts)
    if resample < 0:
        raise PolicyError(f"resample = {resample}, but outputs are drawn again 0 times or more.")
    if output is not None:
        output = check_writable(output, new=True)
    source = default_prompts_path() if prompts == "default" else prompts
    read = load_prompts(source, column=prompt_column, pass_columns=pass_columns, limit=limit)
    chosen = list(read)
    if n * len(chosen) > AT_MOST:
        raise PolicyError(f"n = {n} outputs of {len(chosen)} prompts are more than the {AT_MOST} that fit one file.")
    if best_by is not None:
        show_code(Console(stderr=True), scorer=best_by)
        check_scorer(best_by, columns=read.columns)
    check_model(model)
    policy = load_policy(
        model, device=device, compute_dtype=dtype, special_tokens=special_tokens, chat_template=chat_template
    )
    console = Console(stderr=True)
    reported = [read.summary(), *who_reads(policy, chosen)]
    console.print("\n".join(reported), highlight=False, markup=False, soft_wrap=True)
    with waiting(console, f"sampling {len(chosen)} x {n} completions") as count:
        if best_by is None:
            sets = sample_sets(
                policy, chosen, n, settings, model=model, seed=seed, resample=resample, on_progress=count
            )
            said = _kinds(sets, n)
        else:
            sets, said = _best(policy, chosen, n, settings, best_by, model, seed, count)
    if output is None:
        write_lines([json_line(s.as_row()) for s in sets])
    else:
        write_sets(output, sets)
        said = f"{sum(len(s.outputs) for s in sets)} outputs of {len(sets)} prompts written to {output}\n{said}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)


def _kinds(sets: list[OutputSet], n: int) -> str:
    """How different the outputs of the sets are."""
    alike = sum(s.near_duplicates for s in sets)
    missing = sum(n - len(s.outputs) for s in sets)
    lines = [f"{alike} nearly the same as another of their set" if alike else "all different within their set"]
    if missing:
        lines.append(f"{missing} left out: exact repetitions, however often they were drawn again")
    if n > 1 and (alike + missing) > 0.2 * n * len(sets):
        lines.append("many are alike: raise --temperature, or there is little to judge")
    return "; ".join(lines)


def _best(
    policy: Policy,
    prompts: list[Prompt],
    n: int,
    settings: SamplingSettings,
    scorer: str,
    model: str,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> tuple[list[OutputSet], str]:
    """Best of n: the output of each prompt that the scorer likes most."""
    judge = load_scorer(scorer, columns={name for prompt in prompts for name in prompt.columns})
    try:
        rollouts = policies.sample(policy, prompts, n, settings, seed=seed, step=0, on_progress=on_progress)
        best = best_of(rollouts, judge, timeout=None)
    finally:
        close_scorer(judge)
    checksum = policy.checksum()[:16]
    sets = [set_of_rollouts([rollout], model, settings, seed, checksum) for rollout in best.rollouts]
    scores = [r.score.value for r in best.rollouts if r.score and r.score.value is not None]
    said = f"best of {n} by {shown(scorer)}: mean score {sum(scores) / max(len(scores), 1):.4f}"
    for count, what in (
        (best.without, "prompts without any score left out"),
        (best.failed, "completions that the scorer failed on"),
        (best.abstained, "completions without an opinion"),
        (best.tied, "prompts with several best; the first was taken"),
    ):
        said += f"; {count} {what}" if count else ""
    return sets, "\n".join([said, *(f"! {doubted}" for doubted in doubts(scorer))])

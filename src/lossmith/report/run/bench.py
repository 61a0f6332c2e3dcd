"""A measurement of a recipe as a table, with what it recommends."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lossmith.terminal import put_table
from lossmith.training.bench import ROUNDS, Measurement

__all__ = ["as_record", "recommendations", "show_measurement"]

_MEANING = {
    "sample": "",
    "score": "",
    "log_probs": "old, reference",
    "credit": "advantages",
    "forward": "with gradient",
    "loss": "",
    "backward": "",
    "optimizer": "and clipping",
}


def show_measurement(found: Measurement, console: Console) -> None:
    """The table, then the run's time and memory, then what to change."""
    recipe = found.recipe
    table = Table(box=None, pad_edge=False)
    for name in ("phase", "s a step", "share", "tokens/s", "floor s", "reached"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for name, meaning in _MEANING.items():
        if name not in found.seconds:
            continue
        seconds, floor = found.seconds[name], found.floors.get(name)
        table.add_row(
            f"{name} [dim]{meaning}[/dim]",
            f"{seconds:.2f}",
            f"{seconds / found.step_seconds:.1%}",
            f"{found.tokens / max(seconds, 1e-9):,.0f}" if floor is not None else "",
            "" if floor is None else f"{floor:.2f}",
            "" if floor is None else f"{floor / seconds:.0%}",
        )
    put_table(console, table)
    steps = f"{recipe.prompts_per_step} x {recipe.samples_per_prompt} completions"
    console.print(
        f"\nstep      {found.step_seconds:.1f} s ({found.step_range[0]:.1f} to {found.step_range[1]:.1f} in {ROUNDS} "
        f"rounds) for {steps}, {found.tokens / found.step_seconds:,.0f} tokens/s "
        f"(measured on {found.prompts} of {recipe.prompts_per_step} prompts)\n"
        f"run       about {_duration(found.run_seconds)} for {recipe.steps} steps and two evaluations of "
        f"{found.held_out} prompts\n"
        f"machine   {found.rate / 1e9:,.0f} GFLOP/s in matrix products ({found.compute}, {torch.get_num_threads()} "
        f"threads); the floor is a round's products at that rate\n"
        f"memory    {found.peak_bytes / 1e9:.1f} GB at its peak in this measurement",
        highlight=False,
        soft_wrap=True,
    )
    for line in recommendations(found):
        console.print(f"better    {line}", highlight=False, soft_wrap=True)


def recommendations(found: Measurement) -> list[str]:
    """Settings that would be faster or leaner here, with the measurement that says so; or that none would."""
    recipe, lines = found.recipe, []
    best, now = found.best_micro_batch, recipe.pass_tokens
    if best != now:
        gain = statistics.median(found.update_seconds[now]) / statistics.median(found.update_seconds[best]) - 1
        lines.append(
            f"micro_batch_tokens = {best}: the update is {gain:.0%} faster than with {now} "
            f"({_range(found.update_seconds[best])} against {_range(found.update_seconds[now])} s, {ROUNDS} times each)"
        )
    if found.memory.recompute:
        lines.append("more memory, or a smaller micro_batch_tokens: layers are run again in the backward pass")
    least, most = found.share("score")
    if least > 0.2:
        lines.append(f"a faster scorer: it takes {least:.0%} to {most:.0%} of a step")
    least, most = found.share("log_probs")
    if least > 0.15:
        lines.append(
            f"a loss without a reference or old policy, where it serves you: they take {least:.0%} to {most:.0%} of a "
            "step"
        )
    return lines or [_nothing(found)]


def _nothing(found: Measurement) -> str:
    """That no setting was better beyond the noise, and how large that is."""
    now = found.recipe.pass_tokens
    others = ", ".join(f"{_range(s)} with {size}" for size, s in sorted(found.update_seconds.items()) if size != now)
    return (
        f"nothing that was tried: differences are within the noise. An update takes {_range(found.update_seconds[now])}"
        f" s with micro_batch_tokens = {now}, {others} ({ROUNDS} times each)"
    )


def _range(seconds: Sequence[float]) -> str:
    return f"{min(seconds):.3g} to {max(seconds):.3g}"


def as_record(found: Measurement) -> dict[str, Any]:
    """The measurement for JSON: seconds, bytes, operations a second."""
    return {
        "seconds": found.seconds,
        "seconds_of_rounds": found.rounds,
        "floor_seconds": found.floors,
        "step_seconds": found.step_seconds,
        "run_seconds": found.run_seconds,
        "tokens_per_step": found.tokens,
        "operations_per_second": found.rate,
        "peak_bytes": found.peak_bytes,
        "update_seconds_by_micro_batch_tokens": {str(k): v for k, v in found.update_seconds.items()},
        "recommended": {"micro_batch_tokens": found.best_micro_batch},
        "prompts_measured": found.prompts,
    }


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"

"""What `lossmith plan` prints."""

from __future__ import annotations

import dataclasses
from typing import Any

from lossmith.training.hardware import REACHED, READ, HardwarePlan, Split

__all__ = ["as_record", "show_plan"]

_A_MACHINE = 8  # GPUs in one, as they are sold


def show_plan(plan: HardwarePlan) -> str:
    """The plan as text: a table of memory by part, the split, what crosses, the time, and what they rest on."""
    recipe, gpus = plan.recipe, plan.gpus
    lines = [
        f"model     {recipe.model}: {_count(plan.weights)} weights, {_count(plan.trained)} trained",
        f"round     {recipe.prompts_per_step} prompts of at most {plan.prompt_tokens} tokens x "
        f"{recipe.samples_per_prompt} completions of {recipe.max_tokens}; {recipe.micro_batch_tokens} tokens a pass",
        "",
        *_table(plan.splits, gpus.memory_gb),
        "",
    ]
    if plan.chosen is None:
        lines.append(f"Nothing of this fits {gpus.count} x {gpus.memory_gb:g} GB. What would, alone:")
        return "\n".join([*lines, *(f"  {name}: {_gb(size)} GB a GPU" for name, size in plan.instead)])
    lines.append(f"split     {plan.chosen.name}")
    lines.append(f"start     {_start(plan.chosen)}")
    if gpus.count > 1:
        lines.append(f"between   {_gb(plan.crossing)} GB sent by each GPU in a step")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in REACHED.items())
    phases = ", ".join(f"{name} {value:.2g}" for name, value in plan.seconds.items() if value)
    lines.append(f"time      {sum(plan.seconds.values()):.2g} s a step ({phases})")
    lines.append(
        f"          a model of it, not a measurement: {shares} of {gpus.tflops:g} TFLOP/s, or {READ:.0%} of "
        f"{gpus.bandwidth_gb:g} GB/s of memory; {gpus.link_gb:g} GB/s between GPUs; scoring apart"
    )
    if plan.faster is not None:
        size, seconds = plan.faster
        lines.append(f"better    micro_batch_tokens = {size}: {seconds:.2g} s a step, and it fits")
    if plan.indivisible and not recipe.lora_rank:  # which nobody would deal out
        lines.append(f"! {plan.indivisible}")
    if plan.idle:
        lines.append(
            f"! {plan.idle} of {gpus.count} GPUs have no prompt: raise prompts_per_step, or take fewer of them."
        )
    return "\n".join(lines)


def _start(split: Split) -> str:
    """How to begin; the dots are the options and the recipe that were planned."""
    shard = " --shard" if split.sharded else ""
    if split.ranks == 1:
        return "lossmith train ..."
    if split.ranks <= _A_MACHINE:
        return f"lossmith train ... --ranks {split.ranks}{shard}"
    machines = -(-split.ranks // _A_MACHINE)
    return (
        f"torchrun --nnodes {machines} --nproc-per-node {_A_MACHINE} --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
        f"-m lossmith train ...{shard}"
    )


def as_record(plan: HardwarePlan) -> dict[str, Any]:
    """For --json; bytes and seconds."""
    splits = [
        {
            "name": s.name, "ranks": s.ranks, "sharded": s.sharded, "recompute": s.recompute, "held": s.memory.held,
            "opening": s.memory.opening, "sampling": s.memory.sampling, "update": s.update, "total": s.total,
        }
        for s in plan.splits
    ]  # fmt: skip
    return {
        "weights": plan.weights, "trained": plan.trained, "gpus": dataclasses.asdict(plan.gpus), "splits": splits,
        "chosen": None if plan.chosen is None else plan.chosen.name, "seconds": plan.seconds,
        "crossing": plan.crossing, "idle": plan.idle, "faster": plan.faster, "instead": dict(plan.instead),
    }  # fmt: skip


def _table(splits: list[Split], memory_gb: float) -> list[str]:
    held = [name for name in splits[0].memory.held if splits[0].memory.held[name] or name != "teacher"]
    parts = [*held, "loading", "sampling", "update", "in all"]
    head = [f"GB a GPU, of {memory_gb:g}", *parts, ""]
    rows = [head]
    for split in splits:
        memory = split.memory
        numbers = [*(memory.held[x] for x in held), memory.opening, memory.sampling, split.update, split.total]
        fits = "fits" if split.total <= memory_gb * 1e9 else "does not fit"
        rows.append([split.name, *map(_gb, numbers), fits])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: list[str]) -> str:
        name, *numbers, fits = row
        aligned = (x.rjust(width) for x, width in zip(numbers, widths[1:-1], strict=True))
        return "  ".join([name.ljust(widths[0]), *aligned, fits]).rstrip()

    return [line(row) for row in rows]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 or not size else f"{size / 1e9:.3f}"


def _count(weights: int) -> str:
    return f"{weights / 1e9:.3f} billion" if weights >= 1e8 else f"{weights / 1e6:.3g} million"

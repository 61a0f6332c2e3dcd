"""A round of policy learning on a GPU: sampling and update, time and memory, as a table. One command.

    python benchmarks/on_gpu.py                                   # needs a GPU that torch can use
    python benchmarks/on_gpu.py --device cpu --works tiny --rounds 1 --model FOLDER   # whether it runs at all

Each work of works.py in each compute type and layout: "shared" encodes a prompt once for all its completions, "right"
once for each, padded. A time ends when the device has finished. Peak: the most that torch had on the device; on a CPU,
of the process so far. Waits: how often an update waited for the device, as torch counts it. The first round warms up.
Writes results/on_gpu.json, and the table beside it as on_gpu.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lossmith_worker import letters, peak_gb
from machine import description
from works import WORKS, Work, prompt_texts

from lossmith.policy import Policy, embedded_model, load_policy, sample
from lossmith.prompts import Prompt
from lossmith.scorers import load_scorer, score_rollouts
from lossmith.training import Learner, Recipe
from lossmith.training.roofline import multiply_rate

HERE = Path(__file__).parent
ALL = {"tiny": Work(2, 2, 4, (8,)), **WORKS}
COLUMNS = "work | type | layout | sampling, s | tokens/s | update, s | tokens/s | waits | peak, GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--works", nargs="+", default=["short", "short-reference", "long", "ragged"], choices=list(ALL))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--layouts", nargs="+", default=["shared", "right"], choices=["shared", "right"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "on_gpu.json")
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("torch has no GPU here: torch.cuda.is_available() is False. --device cpu tries the command.")
    rows, rates = [], {}
    for dtype in given.dtypes:
        policy = load_policy(given.model, device=given.device, dtype=dtype)
        rates[f"{dtype} GFLOP/s"] = multiply_rate(policy) / 1e9
        for name in given.works:
            for layout in given.layouts:
                figures = measured(policy, ALL[name], layout, given.rounds)
                rows.append({"work": name, "dtype": dtype, "layout": layout, **figures})
                print(line(rows[-1]), flush=True)
    device = policy.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    record = {"machine": description(), "device": gpu, "rates": rates, "model": given.model, "rounds": rows}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    head = [f"| {COLUMNS} |", "|" + "---|" * len(COLUMNS.split("|"))]
    said = [f"{gpu}; {description()}", ", ".join(f"{k}: {v:.0f}" for k, v in rates.items())]
    table = "\n\n".join([*said, "\n".join([*head, *map(line, rows)])])
    given.out.with_suffix(".md").write_text(table + "\n")
    print(table)


def measured(policy: Policy, work: Work, layout: Any, rounds: int) -> dict[str, Any]:
    """Seconds of every round but the first, tokens, waits of an update, and the most memory at one time."""
    recipe = Recipe.make(
        loss=f"grpo(beta={work.beta})", prompts_per_step=work.prompts, samples_per_prompt=work.samples,
        max_tokens=work.max_tokens, temperature=1.0, learning_rate=1e-12, micro_batch_tokens=16384,
    )  # fmt: skip
    learner = Learner(policy, recipe.policy_loss(), recipe)
    learner.layout = layout
    known, policy.shares = policy.shares, policy.shares and layout == "shared"
    prompts, scorer = [Prompt(text) for text in prompt_texts(policy, work)], load_scorer(letters)
    found: dict[str, list[Any]] = {"sample": [], "update": [], "tokens": []}
    waits = None
    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(policy.device)
    try:
        for step in range(rounds + 1):
            rollouts, seconds = timed(
                policy, lambda step=step: sample(policy, prompts, work.samples, recipe.sampling, seed=0, step=step)
            )
            scored = score_rollouts(scorer, rollouts)

            def update(scored: Any = scored, step: int = step) -> None:
                batch = learner.make_batch(scored)
                learner.update(scored, batch, learner.credit(batch), step)

            if step == 0:
                waits = counted(policy, update)
                continue
            found["sample"].append(seconds)
            found["update"].append(timed(policy, update)[1])
            found["tokens"].append(sum(len(r.completion_ids) for r in rollouts))
    finally:
        policy.shares = known
    on_gpu = policy.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(policy.device) / 1e9 if on_gpu else peak_gb()
    return {**found, "waits": waits, "peak_gb": peak}


def timed(policy: Policy, work: Callable[[], Any]) -> tuple[Any, float]:
    """(what it gives, seconds until the device has finished)."""
    finish(policy)
    start = time.perf_counter()
    result = work()
    finish(policy)
    return result, time.perf_counter() - start


def finish(policy: Policy) -> None:
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)


def counted(policy: Policy, work: Callable[[], Any]) -> int | None:
    """How often it waits for the device; None on a CPU, which is waited for always."""
    if policy.device.type != "cuda":
        work()
        return None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in seen)


def line(row: dict[str, Any]) -> str:
    cells = [row["work"], row["dtype"], row["layout"]]
    for part in ("sample", "update"):
        seconds, rates = row[part], [n / s for n, s in zip(row["tokens"], row[part], strict=True)]
        cells += [f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"]
        cells += [f"{statistics.median(rates):,.0f}"]
    cells += ["" if row["waits"] is None else str(row["waits"]), f"{row['peak_gb']:.1f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

"""The machine's rates, the floor of a round's work, and the fraction of it that each phase reaches.

    python benchmarks/roofline.py [--works short long] [--rounds 5] [--compile] [--out FILE]

The floor counts products with weights alone (see lossmith.training.roofline); the rate is that of a product of the
model's own shape in the type it computes in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lossmith_worker import letters, peak_gb
from machine import description
from works import WORKS, prompt_texts

from lossmith.policy import Policy, embedded_model, load_policy, sample
from lossmith.prompts import Prompt
from lossmith.scorers import load_scorer, score_rollouts
from lossmith.training import Learner, Recipe
from lossmith.training.roofline import count_work, multiply_rate

HERE = Path(__file__).parent


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy that fits into no cache."""
    x = torch.zeros(1 << 28, dtype=torch.uint8)
    y = torch.zeros_like(x)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        y.copy_(x)
        seconds.append(time.perf_counter() - start)
    return 2 * x.numel() / statistics.median(seconds)


def measure(policy: Policy, name: str, rounds: int, compiled: bool) -> dict[str, Any]:
    work = WORKS[name]
    recipe = Recipe.make(
        loss=f"grpo(beta={work.beta})", prompts_per_step=work.prompts, samples_per_prompt=work.samples,
        max_tokens=work.max_tokens, temperature=1.0, learning_rate=1e-12, compile=compiled,
    )  # fmt: skip
    learner = Learner(policy, recipe.policy_loss(), recipe)
    prompts, scorer = [Prompt(text) for text in prompt_texts(policy, work)], load_scorer(letters)
    seconds: dict[str, list[float]] = {"sample": [], "forward": [], "backward": [], "update": []}
    fractions: dict[str, list[float]] = {name: [] for name in seconds}
    for step in range(rounds + 2):
        rate = multiply_rate(policy)  # beside each round: what the machine gives changes from minute to minute
        start = time.perf_counter()
        rollouts = sample(policy, prompts, work.samples, recipe.sampling, seed=0, step=step)
        found = {"sample": time.perf_counter() - start}
        rollouts = score_rollouts(scorer, rollouts)
        batch = learner.make_batch(rollouts)
        update = learner.update(rollouts, batch, learner.credit(batch), step).seconds
        found |= {name: update[name] for name in ("forward", "backward")}
        found["update"] = found["forward"] + found["backward"]
        floors = count_work(policy, rollouts)
        if step > 1:  # the first two warm up
            for part, value in found.items():
                seconds[part].append(value)
                fractions[part].append(getattr(floors, part) / rate / value)
    return {
        part: {"seconds": statistics.median(seconds[part]), "reached": statistics.median(fractions[part])}
        for part in seconds
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", default=["short", "long"], choices=list(WORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="with compile = true in the recipe")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "roofline.json")
    given = parser.parse_args()
    policy = load_policy(str(embedded_model()))
    wide = Policy(policy.model, policy.tokenizer, torch.float32)
    rates = {
        "bfloat16 GFLOP/s": multiply_rate(policy) / 1e9,
        "bfloat16 GFLOP/s, 64 rows": multiply_rate(policy, 64) / 1e9,
        "float32 GFLOP/s": multiply_rate(wide) / 1e9,
        "copy GB/s": copy_rate() / 1e9,
    }
    results = {name: measure(policy, name, given.rounds, given.compile) for name in given.works}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": description(), "rates": rates, "works": results, "peak_gb": peak_gb()}
    given.out.write_text(json.dumps(record, indent=1))
    print("\n".join(f"{name}: {value:.0f}" for name, value in rates.items()))
    print("| work | phase | s | reached |\n|---|---|---|---|")
    for name, parts in results.items():
        for part, x in parts.items():
            print(f"| {name} | {part} | {x['seconds']:.2f} | {x['reached']:.0%} |")


if __name__ == "__main__":
    main()

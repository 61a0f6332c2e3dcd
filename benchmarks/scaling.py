"""Time and memory of a step against prompt length, group size, completion length and vocabulary.

    python benchmarks/scaling.py [--rounds 3] [--axes prompt group completion vocabulary] [--out FILE]

Every point is a process of its own (peak memory is a process's); writes a table and, beside it, a plot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import description

HERE = Path(__file__).parent
BASE = {"prompt": 64, "group": 8, "completion": 64, "vocabulary": 0, "prompts": 4}  # vocabulary 0: the model's own
AXES = {
    "prompt": (64, 128, 256, 512),
    "group": (2, 4, 8, 16, 32),
    "completion": (32, 64, 128, 256),
    "vocabulary": (8192, 16384, 32768, 49152),
}
LONG = 512  # the group axis is measured with prompts of this length: sharing them is what it is about


def point(axis: str, value: int) -> dict[str, int]:
    changed = {"prompt": LONG, "prompts": 2} if axis == "group" else {}
    return {**BASE, **changed, axis: value}


def worker(given: dict[str, int], rounds: int) -> dict[str, Any]:
    """Seconds of a step, by phase, and peak memory."""
    import torch
    from lossmith_worker import letters, peak_gb
    from works import Work, prompt_texts

    from lossmith.policy import embedded_model, load_policy, sample
    from lossmith.prompts import Prompt
    from lossmith.scorers import load_scorer, score_rollouts
    from lossmith.training import Learner, Recipe

    policy = load_policy(str(embedded_model()))
    work = Work(given["prompts"], given["group"], given["completion"], (given["prompt"],))
    prompts = [Prompt(text) for text in prompt_texts(policy, work)]
    if given["vocabulary"]:
        policy.model.resize_token_embeddings(given["vocabulary"])
        policy.encode = lambda prompt: tuple(range(1000, 1000 + given["prompt"]))  # type: ignore[method-assign]
    policy.model.generation_config.eos_token_id = None  # completions of exactly the asked length
    policy.model.config.eos_token_id = policy.tokenizer.eos_token = None
    policy.tokenizer.chat_template = policy.tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    recipe = Recipe.make(
        loss="grpo(beta=0)", prompts_per_step=work.prompts, samples_per_prompt=work.samples,
        max_tokens=work.max_tokens, temperature=1.0, learning_rate=1e-12,
    )  # fmt: skip
    learner, scorer = Learner(policy, recipe.policy_loss(), recipe), load_scorer(letters)
    samples, updates, lengths = [], [], set()
    for step in range(rounds + 1):
        start = time.perf_counter()
        rollouts = sample(policy, prompts, work.samples, recipe.sampling, seed=0, step=step)
        middle = time.perf_counter()
        learner.update(score_rollouts(scorer, rollouts), step)
        samples.append(middle - start)
        updates.append(time.perf_counter() - middle)
        lengths |= {len(r.completion_ids) for r in rollouts}
    assert torch.get_num_threads() > 0 and len(lengths) == 1, f"completions of lengths {lengths}"
    sample_s, update_s = (statistics.median(x[1:]) for x in (samples, updates))
    return {"sample": sample_s, "update": update_s, "total": sample_s + update_s, "peak_gb": peak_gb()}


def plot(results: dict[str, list[dict[str, Any]]], path: Path, machine: str) -> None:
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        2, len(results), figsize=(3.6 * len(results), 5.6), squeeze=False, layout="constrained"
    )
    for column, (axis, points) in zip(rows.T, results.items(), strict=True):
        values = [p["value"] for p in points]
        for name in ("total", "update", "sample"):
            column[0].plot(values, [p[name] for p in points], marker="o", label=name)
        column[1].plot(values, [p["peak_gb"] for p in points], marker="o", color="black")
        title = f"{axis} (prompts of {LONG})" if axis == "group" else axis
        column[0].set(title=title, ylabel="seconds a step", ylim=(0, None))
        column[1].set(xlabel=axis, ylabel="peak GB", ylim=(0, None))
    rows[0, 0].legend()
    figure.suptitle(machine, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scaling.json")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        print(json.dumps(worker(json.loads(given.point), given.rounds)))
        return
    results: dict[str, list[dict[str, Any]]] = {}
    for axis in given.axes:
        for value in AXES[axis]:
            command = [
                sys.executable,
                __file__,
                "--rounds",
                str(given.rounds),
                "--point",
                json.dumps(point(axis, value)),
            ]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.setdefault(axis, []).append({"value": value, **json.loads(out.splitlines()[-1])})
            print(axis, results[axis][-1], flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": description(), "base": BASE, "results": results}, indent=1))
    plot(results, given.out.with_suffix(".svg"), description())
    print("| axis | value | s | against the one before | peak |\n|---|---|---|---|---|")
    for axis, points in results.items():
        for before, x in zip([None, *points], points, strict=False):
            growth = f"{x['total'] / before['total']:.2f}" if before else ""
            print(f"| {axis} | {x['value']} | {x['total']:.2f} | {growth} | {x['peak_gb']:.1f} GB |")


if __name__ == "__main__":
    main()

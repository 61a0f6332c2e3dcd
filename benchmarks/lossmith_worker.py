"""One GRPO step of Lossmith at a time, on request: the counterpart of trl_worker.py.

Reads a work (JSON) from its first argument, then one line of stdin a step; answers with a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from lossmith.policy import load_policy, sample
from lossmith.prompts import Prompt
from lossmith.scorers import load_scorer, score_rollouts
from lossmith.training import Learner, Recipe


def letters(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """Share of letters in a completion: cheap, and different from one to the next."""
    return [sum(x.isalpha() for x in text) / max(len(text), 1) for text in completions]


def peak_gb() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in status if x.startswith("VmHWM")) / 1e6


def main() -> None:
    work = json.loads(sys.argv[1])
    torch.set_num_threads(work["threads"])
    recipe = Recipe.make(
        model=work["model"],
        loss=f"grpo(beta={work['beta']})",
        prompts_per_step=work["prompts_count"],
        samples_per_prompt=work["samples"],
        max_tokens=work["max_tokens"],
        temperature=1.0,
        learning_rate=4e-5,
        **work.get("lossmith", {}),
    )
    prompts = [Prompt(text) for text in work["prompts"]]
    policy, scorer = load_policy(work["model"]), load_scorer(letters)
    learner = Learner(policy, recipe.policy_loss(), recipe)
    for step, _ in enumerate(sys.stdin):
        start = time.perf_counter()
        rollouts = sample(policy, prompts, work["samples"], recipe.sampling, seed=0, step=step)
        sampled = time.perf_counter()
        rollouts = score_rollouts(scorer, rollouts)
        batch = learner.make_batch(rollouts)
        update = learner.update(rollouts, batch, learner.credit(batch), step)
        seconds = {"sample": sampled - start, **update.seconds, "total": time.perf_counter() - start}
        tokens = sum(len(r.completion_ids) for r in rollouts)
        answer = {"seconds": seconds, "tokens": tokens, "peak_gb": peak_gb()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

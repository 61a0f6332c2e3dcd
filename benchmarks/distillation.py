"""Distillation on the default model: the memory of a step beside GRPO's, and a student that comes back to its teacher.

python benchmarks/distillation.py            # both; about ten minutes on two idle cores, 6 GB
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from lossmith.intervals import mean_of
from lossmith.losses import get_loss
from lossmith.policy import Policy, Teacher, load_policy, sample, token_outputs
from lossmith.prompts import Prompt, default_prompts_path, load_prompts
from lossmith.rollouts import Rollout, Score
from lossmith.training import Learner, Recipe

LOSSES = ("grpo(beta=0.04)", "reverse_kl", "forward_kl", "gkd", "skew_kl", "sdpo", "opd")
NOISE = 0.15  # of the standard deviation of each weight matrix, added to the student's
SAMPLING = {"temperature": 1.0, "max_tokens": 48}


def peak_gb() -> float:
    """Most memory of this process so far."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in status if x.startswith("VmHWM")) / 1e6


def scored(rollouts: list[Rollout]) -> list[Rollout]:
    """With a score that differs: the losses of rewards need one, those of a teacher do not look at it."""
    return [dataclasses.replace(r, score=Score(float(len(set(r.completion_ids))))) for r in rollouts]


def one_step(spec: str, model: str, samples: int, dtype: str) -> None:
    """A step of this loss, with a second model of the same size: reference or teacher. Prints its peak as JSON."""
    loss = get_loss(spec)
    taught = "teacher_logp" in loss.needs or loss.divergence is not None
    recipe = Recipe.make(
        model=model, loss=spec, teacher=model if taught else None, prompts_per_step=4, samples_per_prompt=samples,
        dtype=dtype, **SAMPLING,
    )  # fmt: skip
    policy = load_policy(model, dtype=dtype)
    teacher = Teacher(load_policy(model, dtype=dtype, trainable=False)) if taught else None
    learner = Learner(policy, loss, recipe, teacher=teacher)
    rollouts = scored(sample(policy, prompts(4), samples, recipe.sampling, seed=0, step=0))
    before, start = peak_gb(), time.perf_counter()
    batch = learner.make_batch(rollouts)
    learner.update(rollouts, batch, learner.credit(batch), 0)
    tokens = sum(len(r.completion_ids) for r in rollouts)
    print(
        json.dumps({"peak_gb": peak_gb(), "before": before, "seconds": time.perf_counter() - start, "tokens": tokens})
    )


def prompts(count: int, skip: int = 0) -> list[Prompt]:
    return list(load_prompts(default_prompts_path()))[skip : skip + count]


def memory(model: str, samples: int, dtype: str) -> None:
    """Each loss in a process of its own."""
    print(f"a step of 4 prompts x {samples} completions of at most {SAMPLING['max_tokens']} tokens, {model}, {dtype}")
    base = 0.0
    for spec in LOSSES:
        arguments = [sys.executable, __file__, "--step", spec, "--model", model, "--samples", str(samples)]
        done = subprocess.run([*arguments, "--dtype", dtype], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        base = base or found["peak_gb"]
        print(
            f"{spec:16} {found['peak_gb']:6.2f} GB  {found['peak_gb'] / base:5.2f} x grpo   {found['seconds']:6.1f} s",
            flush=True,
        )


def distance(policy: Policy, teacher: Teacher, held_out: list[Prompt], recipe: Recipe, step: int) -> list[float]:
    """KL(student ‖ teacher), nats a token, over the vocabulary on the student's own completions: of each prompt."""
    found = []
    for start in range(0, len(held_out), 8):
        rollouts = sample(policy, held_out[start : start + 8], 1, recipe.sampling, seed=1, step=step)
        with torch.no_grad():
            out = token_outputs(
                policy, rollouts, recipe.sampling, want=frozenset({"divergence"}), teacher=teacher,
                divergence=get_loss("reverse_kl").divergence,
            )  # fmt: skip
        assert out.divergence is not None
        found += (out.divergence.sum(1) / out.mask.sum(1)).tolist()
    return found


def come_back(model: str, spec: str, steps: int, dtype: str) -> None:
    """The teacher is the model, the student itself after noise; a few steps on the student's own completions."""
    policy, teacher = load_policy(model, dtype=dtype), Teacher(load_policy(model, dtype=dtype, trainable=False))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.ndim == 2:
                weight += NOISE * weight.std() * torch.randn(weight.shape, generator=draw)
    recipe = Recipe.make(
        model=model, loss=spec, teacher=model, learning_rate=2e-5, steps=steps, prompts_per_step=8,
        samples_per_prompt=1, dtype=dtype, **SAMPLING,
    )  # fmt: skip
    learner, held_out = Learner(policy, recipe.policy_loss(), recipe, teacher=teacher), prompts(24)
    before = distance(policy, teacher, held_out, recipe, 0)
    for step in range(steps):
        rollouts = scored(sample(policy, prompts(8, 24 + 8 * step), 1, recipe.sampling, seed=0, step=step))
        batch = learner.make_batch(rollouts)
        update = learner.update(rollouts, batch, learner.credit(batch), step)
        print(
            f"step {step + 1}: {update.metrics.get('divergence', update.metrics.get('kl_teacher', 0.0)):.4f}",
            flush=True,
        )
    after = distance(policy, teacher, held_out, recipe, 0)
    change = mean_of([b - a for a, b in zip(before, after, strict=True)])
    print(
        f"{spec}: KL(student || teacher) {mean_of(before).mean:.3f} -> {mean_of(after).mean:.3f} nats a token; "
        f"paired difference {change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f}), n = {len(before)} prompts"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--step", help="only a step of this loss, its peak as JSON")
    parser.add_argument("--only", choices=("memory", "run"))
    given = parser.parse_args()
    if given.step:
        return one_step(given.step, given.model, given.samples, given.dtype)
    if given.only != "run":
        memory(given.model, given.samples, given.dtype)
    if given.only != "memory":
        come_back(given.model, "reverse_kl", given.steps, given.dtype)


if __name__ == "__main__":
    main()

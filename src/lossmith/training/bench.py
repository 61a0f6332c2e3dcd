"""A short measurement of a recipe on this machine: seconds by phase, the floor, memory, and better settings."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lossmith.errors import quiet_traps
from lossmith.policy import Policy, sample
from lossmith.prompts import Prompt
from lossmith.rollouts import Rollout
from lossmith.scorers import Scorer, close_scorer, load_scorer, score_rollouts
from lossmith.scorers.scorer import bind_scorer
from lossmith.training.clock import Clock
from lossmith.training.learner import Learner, Update
from lossmith.training.loop import those_scored
from lossmith.training.memory import MemoryEstimate
from lossmith.training.prepare import Plan, policy_of
from lossmith.training.recipe import Recipe
from lossmith.training.roofline import Work, count_work, multiply_rate
from lossmith.training.teaching import teacher_of

__all__ = ["Measurement", "measure_recipe"]

ROUNDS = 4  # each thing is measured so often: of two alike, one is always the faster once in 70 (4!·4!/8!)
_SECONDS = 8.0  # what one round of the measurement may take; of larger rounds, a share of the prompts is measured
_STEP = 1 << 30  # random numbers of its own: a measurement is no step of a run


@dataclass(frozen=True)
class Measurement:
    """One step of a recipe, scaled up from the share of its prompts that was measured."""

    recipe: Recipe
    prompts: int  # that were measured
    seconds: dict[str, float]  # of a whole step, by phase: the median of the rounds
    rounds: list[dict[str, float]]  # the same of each round
    tokens: float  # response tokens of a whole step
    work: Work  # operations of a whole step
    rate: float  # operations a second that this machine reaches
    compute: str  # the type that products are computed in
    peak_bytes: float
    memory: MemoryEstimate
    update_seconds: dict[int, list[float]]  # {micro_batch_tokens: seconds of a whole step's update, each time}
    held_out: int  # prompts that are sampled from before and after

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def run_seconds(self) -> float:
        """All steps, and the two evaluations; loading and saving apart."""
        a_completion = self.seconds["sample"] / (self.recipe.prompts_per_step * self.recipe.samples_per_prompt)
        return self.recipe.steps * self.step_seconds + 2 * self.held_out * a_completion

    @property
    def floors(self) -> dict[str, float]:
        """Seconds of the matrix products of a phase at the machine's rate."""
        return {name: getattr(self.work, name) / self.rate for name in ("sample", "forward", "backward")}

    @property
    def step_range(self) -> tuple[float, float]:
        """Seconds of the fastest and of the slowest round."""
        sums = [sum(one.values()) for one in self.rounds]
        return min(sums), max(sums)

    @property
    def best_micro_batch(self) -> int:
        """The recipe's, unless another was faster every time than the recipe's ever was: then the fastest of those."""
        now = self.update_seconds[self.recipe.pass_tokens]
        faster = {
            statistics.median(seconds): size for size, seconds in self.update_seconds.items() if max(seconds) < min(now)
        }
        return faster[min(faster)] if faster else self.recipe.pass_tokens

    def share(self, phase: str) -> tuple[float, float]:
        """Least and greatest share of a step that a phase took in a round."""
        shares = [one.get(phase, 0.0) / sum(one.values()) for one in self.rounds]
        return min(shares), max(shares)


def measure_recipe(plan: Plan) -> Measurement:
    """Sample, score and update, several times. The policy's weights stay as they are."""
    recipe = plan.recipe.model_copy(update={"learning_rate": 0.0, "value_learning_rate": 0.0})
    policy = policy_of(recipe)
    settings = recipe.scorer_settings(len(plan.train))
    scorer = load_scorer(recipe.scorer, columns=plan.train.columns, settings=settings)
    try:
        bind_scorer(scorer, policy)
        return _measure(plan, recipe, policy, scorer)
    finally:
        close_scorer(scorer)


def _measure(plan: Plan, recipe: Recipe, policy: Policy, scorer: Scorer) -> Measurement:
    with quiet_traps():
        teacher = teacher_of(recipe, policy, plan.train)
        learner = Learner(policy, recipe.policy_loss(), recipe, teacher=teacher)
    prompts = plan.train.batch(0, recipe.prompts_per_step, recipe.seed)
    count = _share(learner, prompts[:1], scorer, len(prompts))
    scale = len(prompts) / count
    rounds = []
    for _ in range(ROUNDS):
        clock = Clock()
        rollouts = _round(learner, prompts[:count], scorer, clock)
        update = _update(learner, rollouts)
        seconds = {name: scale * value for name, value in (clock.read() | update.seconds).items()}
        rounds.append(seconds | {"optimizer": update.seconds["optimizer"]})  # as long for any number of prompts
    work = count_work(policy, rollouts)
    return Measurement(
        recipe=plan.recipe,
        prompts=count,
        seconds={name: statistics.median(one[name] for one in rounds) for name in rounds[0]},
        rounds=rounds,
        tokens=scale * sum(len(r.completion_ids) for r in rollouts),
        work=Work(*(scale * getattr(work, f.name) for f in dataclasses.fields(work))),
        rate=max(multiply_rate(policy), multiply_rate(policy, 256)),
        compute=str(policy.compute_dtype).removeprefix("torch."),
        peak_bytes=_peak(policy),
        memory=learner.memory,
        update_seconds=_micro_batches(learner, rollouts, scale),
        held_out=len(plan.held_out),
    )


def _round(learner: Learner, prompts: Sequence[Prompt], scorer: Scorer, clock: Clock) -> list[Rollout]:
    recipe = learner.recipe
    with clock("sample"):
        rollouts = sample(
            learner.policy, prompts, recipe.samples_per_prompt, recipe.sampling, seed=recipe.seed, step=_STEP
        )
    with clock("score"):
        return score_rollouts(scorer, rollouts, on_error=recipe.scorer_errors, timeout=recipe.scorer_timeout)


def _update(learner: Learner, rollouts: Sequence[Rollout]) -> Update:
    scored = those_scored(rollouts, 0)
    batch = learner.make_batch(scored)
    return learner.update(scored, batch, learner.credit(batch), 0)


def _share(learner: Learner, one: Sequence[Prompt], scorer: Scorer, most: int) -> int:
    """How many prompts fit into the time of a round, found with one; everything is warm afterwards."""
    clock = Clock()
    _update(learner, _round(learner, one, scorer, clock))  # the first touch of memory takes long
    start = time.perf_counter()
    _update(learner, _round(learner, one, scorer, clock))
    return max(1, min(most, int(_SECONDS / (time.perf_counter() - start))))


def _micro_batches(learner: Learner, rollouts: list[Rollout], scale: float) -> dict[int, list[float]]:
    """Seconds of an update with half, once and twice the recipe's tokens in a forward pass.

    In turns, so that a machine that grows slower or faster meanwhile favors none.
    """
    recipe = learner.recipe
    now = recipe.pass_tokens
    seconds: dict[int, list[float]] = {size: [] for size in dict.fromkeys((now, max(now // 2, 1), 2 * now))}
    for k in range(ROUNDS):
        for size in list(seconds)[:: 1 if k % 2 else -1]:
            learner.recipe = recipe.model_copy(update={"micro_batch_tokens": size})
            seconds[size].append(scale * sum(_update(learner, rollouts).seconds.values()))
    learner.recipe = recipe
    return seconds


def _peak(policy: Policy) -> float:
    """Bytes: of the device where it counts them, else the most that this process has held."""
    if policy.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(policy.device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) if sys.platform == "darwin" else 1024.0 * peak

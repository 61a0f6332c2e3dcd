"""The loop: sample, score, formulate the loss, update, and again.

`learn` yields one Step a round. Logging, progress and early stopping belong to whoever iterates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossmith.errors import RecipeError, RunError, quiet_traps
from lossmith.policy import Policy, check_compiler, check_model, load_policy, sample
from lossmith.prompts import Prompt, PromptSet, default_prompts_path, load_prompts
from lossmith.rewards import Scorer, check_scorer, load_scorer, score_rollouts
from lossmith.rewards.scorer import bind_scorer, verify_scorer
from lossmith.rollouts import Rollout
from lossmith.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from lossmith.training.clock import Clock
from lossmith.training.evaluate import Evaluation, comparison, evaluate
from lossmith.training.guards import Guard, prompt_means
from lossmith.training.learner import Learner, Update
from lossmith.training.recipe import Recipe
from lossmith.training.run import RunFolder, check_disk

__all__ = ["Plan", "Run", "Step", "columns_of", "learn", "open_run", "plan"]


@dataclass(frozen=True)
class Step:
    """One round: what was sampled and scored, what the update did, and how long each part took (seconds)."""

    index: int
    rollouts: list[Rollout]
    update: Update
    seconds: dict[str, float]
    watched: list[float] = field(default_factory=list)  # the watching scorer's mean for each prompt

    @property
    def record(self) -> dict[str, Any]:
        """The step's line in metrics.jsonl."""
        scores = [r.score.value for r in self.rollouts if r.score and r.score.value is not None]
        lengths = [len(r.completion_ids) for r in self.rollouts]
        return {
            "step": self.index,
            "reward": statistics.fmean(scores),
            "reward_std": statistics.pstdev(scores),
            "length": statistics.fmean(lengths),
            # -log p of what was sampled is an unbiased estimate of the entropy, and costs nothing
            "sampled_entropy": -sum(float(r.behavior_logp.values.sum()) for r in self.rollouts) / sum(lengths),
            "ended": statistics.fmean(not r.truncated for r in self.rollouts),
            "dropped": self.update.dropped,
            "skipped_updates": self.update.skipped,
            **self.update.metrics,
            "tokens_per_second": sum(lengths) / max(sum(self.seconds.values()), 1e-9),
            **_watch(self.watched),
            **{f"seconds_{part}": value for part, value in self.seconds.items()},
            **{f"seconds_update_{part}": value for part, value in self.update.seconds.items()},
        }


def _watch(means: list[float]) -> dict[str, float]:
    """The mean of the prompts' means, and the variance of that mean."""
    if not means:
        return {}
    variance = statistics.variance(means) / len(means) if len(means) > 1 else 0.0
    return {"watch": statistics.fmean(means), "watch_variance": variance}


@dataclass(frozen=True)
class Plan:
    """A checked recipe and its data, before any model is loaded."""

    recipe: Recipe
    train: PromptSet
    held_out: PromptSet
    report: str  # what the prompt file held


@dataclass
class Run:
    """Everything a run works with."""

    recipe: Recipe
    prompts: PromptSet
    held_out: PromptSet
    scorer: Scorer
    policy: Policy
    learner: Learner
    folder: RunFolder
    watch: Scorer | None = None
    guard: Guard = field(default_factory=Guard)
    stopped: str = ""  # why a guard ended the run before its last step
    checkpoint: Path | None = None  # to go on from
    before: Evaluation | None = None
    first_step: int = 0
    after: Evaluation | None = None
    watched_before: Evaluation | None = None
    summary: dict[str, Any] = field(default_factory=dict)  # what summary.json holds, once the run is finished
    started: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """Measure the untrained policy on the held-out prompts; then, in a resumed run, load the checkpoint."""
        if self.before is not None:
            return
        self.before = evaluate(self.policy, self.held_out, self.scorer, self.recipe)
        self.folder.add_rollouts("held-out-before", self.before.rollouts)
        self.watched_before = self._watched(self.before)
        if self.checkpoint is not None:
            self.first_step = int(load_checkpoint(self.checkpoint, self.learner)["step"])
            self.folder.keep_metrics_before(self.first_step)
            for record in self.folder.metrics():
                self.guard.reason_to_stop(record)

    def _watched(self, evaluation: Evaluation) -> Evaluation | None:
        """The same completions as the watching scorer sees them."""
        if self.watch is None:
            return None
        return Evaluation(score_watch(self, evaluation.rollouts))

    def remaining_steps(self) -> range:
        return range(self.first_step, self.recipe.steps)

    def finish(self) -> None:
        """Evaluate the policy on the held-out prompts again, save it, and write summary.json."""
        assert self.before is not None, "a run that was never started has nothing to compare with"
        self.after = after = evaluate(self.policy, self.held_out, self.scorer, self.recipe)
        verify_scorer(self.scorer)
        self.folder.add_rollouts("held-out-after", after.rollouts)
        self.policy.save(self.folder.path / "policy")
        more = {
            "steps": self.recipe.steps,
            "loss": str(self.learner.loss),
            "policy_checksum": self.policy.checksum(),
            "seconds": time.perf_counter() - self.started,
            **({"stopped": self.stopped} if self.stopped else {}),
        }
        watched = self._watched(after)
        if self.watched_before is not None and watched is not None:
            more["watch"] = comparison(self.watched_before, watched)
        self.summary = self.folder.write_summary(self.before, after, more)


def learn(run: Run) -> Iterator[Step]:
    """One Step per round, each recorded in the run's folder before it is yielded."""
    run.start()
    recipe, clock = run.recipe, Clock()
    for index in run.remaining_steps():
        prompts = run.prompts.batch(index, recipe.prompts_per_step, recipe.seed)  # x ~ D, inputs only
        rollouts = sample_and_score(run, prompts, index, clock)  # y ~ pi_theta(.|x), r(x, y)
        with clock("update"):  # theta <- argmin L
            update = run.learner.update(rollouts, index)
        watched: list[float] = []
        if run.watch is not None:
            with clock("watch"):
                watched = prompt_means(score_watch(run, rollouts))
        step = Step(index, update.rollouts, update, clock.read(), watched)
        record(run, step)
        run.stopped = run.guard.reason_to_stop(step.record)
        yield step
        if run.stopped:
            return


def sample_and_score(run: Run, prompts: Sequence[Prompt], index: int, clock: Clock) -> list[Rollout]:
    """n scored completions of each prompt. A scorer that merely waits is asked as soon as a group is written."""
    recipe = run.recipe

    def score(rollouts: list[Rollout]) -> list[Rollout]:
        return score_rollouts(run.scorer, rollouts, on_error=recipe.scorer_errors, timeout=recipe.scorer_timeout)

    with ThreadPoolExecutor(1) as pool:  # one request at a time, as without it
        asked: dict[str, Future[list[Rollout]]] = {}
        ahead = getattr(run.scorer, "waits", False)
        with clock("sample"):
            rollouts = sample(
                run.policy, prompts, recipe.samples_per_prompt, recipe.sampling, seed=recipe.seed, step=index,
                on_group=lambda group: asked.update({group[0].prompt.id: pool.submit(score, group)}) if ahead else None,
            )  # fmt: skip
        with clock("score"):
            if not ahead:
                return score(rollouts)
            return [rollout for prompt in prompts for rollout in asked[prompt.id].result()]


def score_watch(run: Run, rollouts: list[Rollout]) -> list[Rollout]:
    """Scored by the scorer that watches; none where there is none."""
    if run.watch is None:
        return []
    return score_rollouts(run.watch, rollouts, on_error=run.recipe.scorer_errors, timeout=run.recipe.scorer_timeout)


def record(run: Run, step: Step) -> None:
    """Write the step down: metrics, rollouts, and a checkpoint when it is due."""
    recipe = run.recipe
    run.folder.add_metrics(step.record)
    if recipe.save_rollouts:
        run.folder.add_rollouts(f"step-{step.index:05d}", step.rollouts)
    done = step.index + 1
    if recipe.checkpoint_every and done % recipe.checkpoint_every == 0 and done < recipe.steps:
        save_checkpoint(run.folder.path, run.learner, done)


# -- before the first step --------------------------------------------------------------------------------------------


def plan(recipe: Recipe) -> Plan:
    """Check all that can be checked before a model is loaded: loss, prompts, scorer, model folder, batch arithmetic."""
    recipe.policy_loss()
    if recipe.compile:
        check_compiler()
    source = (
        default_prompts_path() if isinstance(recipe.prompts, str) and recipe.prompts == "default" else recipe.prompts
    )
    prompts = load_prompts(
        source,
        pass_columns=recipe.pass_columns,
        column=recipe.prompt_column,
        split=recipe.prompt_split,
        limit=recipe.prompt_limit,
    )
    train, held_out = prompts.split(recipe.held_out, recipe.seed)
    if len(held_out) < 2:
        raise RecipeError(f"held_out = {recipe.held_out} keeps one prompt, and an interval needs at least two.")
    if recipe.prompts_per_step > len(train):
        raise RecipeError(
            f"prompts_per_step = {recipe.prompts_per_step}, but only {len(train)} prompts are left for training after "
            f"{len(held_out)} are held out. Give more prompts, or lower prompts_per_step or held_out."
        )
    for scorer in (recipe.scorer, recipe.watch):
        if scorer is not None:
            check_scorer(scorer, columns=columns_of(prompts))
    check_model(recipe.model)
    return Plan(recipe, train, held_out, prompts.summary())


def open_run(plan: Plan, resume: Path | None = None) -> Run:
    """Load the model and open the run: new, or exactly where the last checkpoint of `resume` stopped."""
    recipe = plan.recipe
    scorer = load_scorer(recipe.scorer, columns=columns_of(plan.train))
    watch = None if recipe.watch is None else load_scorer(recipe.watch, columns=columns_of(plan.train))
    policy = load_policy(recipe.model, device=recipe.device, compute_dtype=recipe.dtype)
    for one in (scorer, watch):
        bind_scorer(one, policy)
    check_disk(recipe.runs, disk_needed(policy, recipe))
    _check_lengths(policy, plan)
    with quiet_traps():  # policy_loss has refused traps, or the recipe allows them
        learner = Learner(policy, recipe.policy_loss(), recipe)
    checkpoint = None if resume is None else latest_checkpoint(resume)
    if resume is not None and checkpoint is None:
        raise RunError(f"{resume} holds no complete checkpoint to resume from.")
    folder = RunFolder.create(recipe, learner.loss.name) if resume is None else RunFolder(resume)
    return Run(
        recipe,
        plan.train,
        plan.held_out,
        scorer,
        policy,
        learner,
        folder,
        watch,
        Guard.of(recipe, learner.loss),
        checkpoint=checkpoint,
    )


def columns_of(prompts: PromptSet) -> set[str]:
    return {name for prompt in prompts for name in prompt.columns}


def _check_lengths(policy: Policy, plan: Plan) -> None:
    """A prompt that leaves no room for its completion is found before the first step, not in the middle of the run."""
    for prompt in (*plan.train, *plan.held_out):
        length = len(policy.encode(prompt))
        if length + plan.recipe.max_tokens > policy.context_length:
            raise RecipeError(
                f"{prompt.source}: the prompt has {length} tokens, and with max_tokens = {plan.recipe.max_tokens} "
                f"exceeds the model's context of {policy.context_length}. Shorten or drop it, or lower max_tokens."
            )


def disk_needed(policy: Policy, recipe: Recipe) -> int:
    """Bytes a run may write: the policy, and a checkpoint with its optimiser state beside the one before it."""
    weights = sum(p.numel() * 4 for p in policy.model.parameters())
    checkpoints = 2 * 3 * weights if 0 < recipe.checkpoint_every < recipe.steps else 0
    return weights + checkpoints + 50_000_000

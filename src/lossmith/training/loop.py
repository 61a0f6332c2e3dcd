"""The loop: prompts -> rollouts -> batch -> credit -> update, and again.

`learn` yields one Step a round. Logging, progress and early stopping belong to whoever iterates.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lossmith.detectors import Completion, Finding, Place, action_of, measure
from lossmith.errors import RunError
from lossmith.losses import Batch, Credit
from lossmith.policy import Policy
from lossmith.prompts import Prompt, PromptSet
from lossmith.rollouts import Rollout
from lossmith.samplers import Sampler
from lossmith.scorers import Scorer, close_scorer, score_rollouts
from lossmith.scorers.scorer import verify_scorer
from lossmith.training.card import of_rollouts, write_card
from lossmith.training.clock import Clock
from lossmith.training.evaluate import EVALUATION_STEP, Evaluation, comparison, during, paired, rescored, tally
from lossmith.training.going_on import GoingOn
from lossmith.training.guards import Guards, prompt_means
from lossmith.training.keeping import Keeping
from lossmith.training.learner import Learner, Update
from lossmith.training.measured_passes import settle_passes
from lossmith.training.metrics import aliases, in_completions, of_lag, of_scorer, of_watch
from lossmith.training.recipe import Recipe
from lossmith.training.run import BEST, RunFolder
from lossmith.training.sharing import in_order

__all__ = ["Run", "Step", "learn", "look", "those_scored"]


@dataclass(frozen=True)
class Step:
    """One round: what was sampled and scored, what the update did, and how long each part took (seconds)."""

    index: int
    rollouts: list[Rollout]  # with their advantages; None of those without a score, from which nothing is learned
    update: Update
    seconds: dict[str, float]
    watched: list[float] = field(default_factory=list)  # the watching scorer's mean for each prompt
    batch: Batch | None = None  # of the rollouts with a score: what the loss saw before the update
    credit: Credit | None = None  # and what it made of it
    findings: list[Finding] = field(default_factory=list)  # what the guards say now, and did not before
    held_out: dict[str, float] = field(default_factory=dict)  # the held-out prompts before the update, if looked at
    pushed: dict[str, float] = field(default_factory=dict)  # how surely the sampler has the policy's weights

    @functools.cached_property
    def seen(self) -> tuple[dict[str, float], dict[str, list[Place]]]:
        """What only the completions tell, and examples of it."""
        numbers, places = measure(self.index, [Completion.of(r) for r in self.rollouts])
        numbers.pop("advantage_abs", None)  # the loss knows it of every token
        return numbers, places

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The step's line in metrics.jsonl."""
        scores = [r.score.value for r in self.rollouts if r.score and r.score.value is not None]
        lengths = [len(r.completion_ids) for r in self.rollouts]
        figures = {
            "step": self.index,
            "reward": statistics.fmean(scores),
            "reward_std": statistics.pstdev(scores),
            "length": statistics.fmean(lengths),
            # -log p of what was sampled is an unbiased estimate of the entropy, and costs nothing
            "sampled_entropy": -sum(float(r.behavior_logp.values.sum()) for r in self.rollouts) / sum(lengths),
            "ended": statistics.fmean(not r.truncated for r in self.rollouts),
            "dropped": sum(not r.scored for r in self.rollouts),
            "skipped_updates": self.update.skipped,
            **in_completions(self.update.metrics),
            "tokens_per_second": sum(lengths) / max(sum(self.seconds.values()), 1e-9),
            **of_watch(self.watched),
            **self.held_out,
            **self.pushed,
            **of_scorer(self.rollouts),
            **of_lag(self.batch),
            **{f"seconds_{part}": value for part, value in self.seconds.items()},
            **{f"seconds_update_{part}": value for part, value in self.update.seconds.items()},
        }
        return figures | {k: v for k, v in self.seen[0].items() if k not in figures} | aliases(figures)


@dataclass
class Run(Keeping):
    """Everything a run works with."""

    recipe: Recipe
    prompts: PromptSet
    held_out: PromptSet
    scorer: Scorer
    policy: Policy
    learner: Learner
    folder: RunFolder
    sampler: Sampler
    watch: Scorer | None = None
    guards: Guards = field(default_factory=Guards)
    going_on: GoingOn = field(default_factory=GoingOn)
    stopped: str = ""  # why a guard ended the run before its last step
    before: Evaluation | None = None
    after: Evaluation | None = None
    watched_before: Evaluation | None = None
    summary: dict[str, Any] = field(default_factory=dict)  # what summary.json holds, once the run is finished
    started: float = field(default_factory=time.perf_counter)
    tell: Callable[[str, int, int], None] = lambda what, done, total: None  # told what is done, and how far it is

    @property
    def steps(self) -> int:
        return self.recipe.steps

    def start(self) -> None:
        """Measure the untrained policy on the held-out prompts; then, in a resumed run, load the checkpoint."""
        if self.before is not None:
            return
        checkpoint = self.going_on.checkpoint
        if checkpoint is not None and not self.going_on.changed:
            self.folder.digests = checkpoint.state()["rollouts"]
        self.before = self._once("held-out-before", self._evaluate)
        if self.watch is not None:
            self.watched_before = self._once("held-out-before-watched", lambda: self._watched(self.before))
        self.load()
        first = self.prompts.batch(0, self.recipe.prompts_per_step, self.recipe.seed)
        self.going_on.notes += settle_passes(self.learner, self.folder, first, self.tell)
        self.folder.best(until=self.first_step)
        self.guards.go_on(self.folder.metrics(), self.folder)

    def _once(self, name: str, measure: Callable[[], Evaluation]) -> Evaluation:
        """What the run measured before it stopped; measured now where it did not, or where that is not whole."""
        kept = self.folder.read_rollouts(name, self.held_out)
        if kept is not None:
            return Evaluation(kept)
        evaluation = measure()
        self.folder.add_rollouts(name, evaluation.rollouts)
        return evaluation

    def _evaluate(self) -> Evaluation:
        """One completion of each held-out prompt, scored."""
        prompts = list(self.held_out)
        self.sampler.push()
        parts = self.learner.ranks.call("sample", prompts, 1, EVALUATION_STEP)
        return Evaluation(in_order(prompts, [rollouts for rollouts, _ in parts]))

    def _watched(self, evaluation: Evaluation | None) -> Evaluation:
        """The same completions as the watching scorer sees them."""
        assert evaluation is not None
        return Evaluation(score_watch(self, evaluation.rollouts))

    def look_at_held_out(self, clock: Clock) -> dict[str, float]:
        """Between two steps, where it is time: the held-out prompts, and the policy kept if it is the best so far."""
        every = self.recipe.evaluate_every
        if not every or self.done % every:
            return {}
        assert self.before is not None
        if not self.done:
            return during(self.before, self.before)
        with clock("evaluate"):
            now = self._evaluate()
            self._keep_if_best(now)
        return during(self.before, now)

    def _keep_if_best(self, now: Evaluation) -> None:
        best = self.folder.best()
        if not self.recipe.keep_best or not math.isfinite(now.mean) or (best is not None and now.mean <= best["mean"]):
            return
        self.saving = True
        try:
            told = {"after_steps": self.done, "mean": now.mean, "n": len(now.scores)}
            self.folder.save_policy(self.policy, BEST, told)
        finally:
            self.saving = False

    def remaining_steps(self) -> range:
        return range(self.first_step, self.recipe.steps)

    def finish(self) -> None:
        """Evaluate the policy on the held-out prompts again, save it, and write summary.json."""
        assert self.before is not None, "a run that was never started has nothing to compare with"
        self.save()  # what more steps would go on from
        self.after = after = self._evaluate()
        verify_scorer(self.scorer)
        self.folder.add_rollouts("held-out-after", after.rollouts)
        self._keep_if_best(after)
        self.folder.save_policy(self.policy)
        summary = {
            "held_out": comparison(self.before, after),
            "steps": self.recipe.steps,
            "loss": str(self.learner.loss),
            "training": tally(
                self.folder.metrics(), self.recipe.prompts_per_step * self.recipe.samples_per_prompt, self.before, after
            ),
            "policy_checksum": self.policy.checksum(),
            "seconds": time.perf_counter() - self.started,
            **self._found(self.before, after),
            **self._best(),
            **({"stopped": self.stopped} if self.stopped else {}),
            **({"accepted_changes": self.going_on.accepted} if self.going_on.accepted else {}),
        }
        if self.watched_before is not None:
            summary["watch"] = comparison(self.watched_before, self._watched(after))
        facts = of_rollouts(self.recipe, summary, len(self.prompts), self.folder.metrics())
        write_card(self.folder, self.recipe, self.learner.loss, facts)
        self.folder.write_summary(summary)
        self.summary = summary

    def _best(self) -> dict[str, Any]:
        """The policy that is kept beside the last one, and how many it is the best of."""
        best = self.folder.best() if self.recipe.keep_best else None
        looks = sum("held_out" in r and r["step"] > 0 for r in self.folder.metrics()) + 1
        return {} if best is None else {"best": {**best, "of": looks}}

    def _found(self, before: Evaluation, after: Evaluation) -> dict[str, Any]:
        """What the guards find in the whole run; for them, the scorer is asked again about the first texts."""
        again = None
        if action_of(self.recipe.guards, "scorer_drift") != "off":
            self.tell("scoring the first completions again", 0, 0)
            texts = [dataclasses.replace(r, score=None) for r in before.rollouts if r.scored]
            second = score_rollouts(self.scorer, texts, on_error="drop", timeout=self.recipe.scorer_timeout)
            again = rescored(before, Evaluation(second), paired(before, after).mean)
        diagnosis, new = self.guards.at_end(again)
        self.folder.add_findings(max(self.done - 1, 0), new)
        # without the places: of the steps before a resumption they are in findings.jsonl alone
        findings = [{k: v for k, v in f.as_dict().items() if k != "places"} for f in diagnosis.findings]
        return {"rescored": again, "findings": findings}

    def close(self) -> None:
        if self.summary:
            self.learner.ranks.end()
        close_scorer(self.scorer)
        close_scorer(self.watch)
        self.sampler.close()
        super().close()


def learn(run: Run) -> Iterator[Step]:
    """One Step per round, each recorded in the run's folder before it is yielded."""
    run.start()
    recipe, learner, clock = run.recipe, run.learner, Clock()
    for index in run.remaining_steps():
        held_out = run.look_at_held_out(clock)
        prompts = run.prompts.batch(index, recipe.prompts_per_step, recipe.seed)  # x ~ D, inputs only
        started = time.perf_counter()
        if pushed := run.sampler.push():  # the weights, to where the completions are written
            clock.add({"push": time.perf_counter() - started})
        rollouts = sample_and_score(run, prompts, index, clock)  # y ~ pi_theta(.|x), r(x, y)
        watched = watch(run, rollouts, clock)
        with clock("update"):
            run.tell("updating", 0, 0)
            scored = those_scored(rollouts, index)
            batch = learner.make_batch(scored)  # log pi_old and log pi_ref, where the loss asks for them
            credit = learner.credit(batch)  # A of every token, and what its weight is divided by
            update = learner.update(scored, batch, credit, index)  # theta <- argmin L
            if update.old_logp is not None:
                batch = batch.replace(old_logp=update.old_logp)
                credit = learner.loss.completed(credit, batch)
        credited = with_advantages(rollouts, credit)
        step = Step(index, credited, update, clock.read(), watched, batch, credit, held_out=held_out, pushed=pushed)
        record(run, step)
        look(run, step)
        yield step
        if run.stopped:
            return


def sample_and_score(run: Run, prompts: Sequence[Prompt], index: int, clock: Clock) -> list[Rollout]:
    """n scored completions of each prompt."""
    start = time.perf_counter()
    parts = run.learner.ranks.call("sample", list(prompts), run.recipe.samples_per_prompt, index)
    clock.add(parts[0][1])
    if len(parts) > 1:
        clock.add({"wait": time.perf_counter() - start - sum(parts[0][1].values())})  # for the other ranks
    return in_order(prompts, [rollouts for rollouts, _ in parts])


def those_scored(rollouts: Sequence[Rollout], index: int) -> list[Rollout]:
    """Those that have a score, which the others leave no trace in. RunError: none has."""
    scored = [r for r in rollouts if r.scored]
    if not scored:
        raise RunError(
            f"step {index + 1}: none of {len(rollouts)} completions has a score; there is nothing to learn from."
        )
    return scored


def with_advantages(rollouts: Sequence[Rollout], credit: Credit) -> list[Rollout]:
    """The rollouts in their order, those with a score now with the mean advantage of their tokens."""
    sums = iter(credit.advantage.sum(1).tolist())
    return [
        dataclasses.replace(r, advantage=next(sums) / len(r.completion_ids) if r.scored else None) for r in rollouts
    ]


def watch(run: Run, rollouts: list[Rollout], clock: Clock) -> list[float]:
    """What the watching scorer thinks of a round: its mean for each prompt. Nothing is trained on it."""
    if run.watch is None:
        return []
    with clock("watch"):
        return prompt_means(score_watch(run, rollouts))


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
        run.folder.add_rollouts(f"step-{step.index:05d}", step.rollouts, step.batch, step.credit)
    run.recorded(step.index + 1)


def look(run: Run, step: Step) -> None:
    """What the guards find after the step, said in it and written down; it may end the run."""
    step.findings.extend(run.guards.after(step.record, step.seen[1]))
    run.folder.add_findings(step.index, step.findings)
    run.stopped = next((f.sentence for f in step.findings if f.level == "stop"), "")

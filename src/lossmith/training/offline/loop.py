"""A policy learned straight from preferences, without a reward model: DPO and its kin on a fixed file.

`learn_preferences` yields one step at a time, as `learn` does; nothing is sampled, and no scorer is asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from lossmith.durable.inputs import Inputs, circumstances, digest, of_code, of_model
from lossmith.errors import FeedbackError, PromptError, RecipeError, RunError, quiet_traps
from lossmith.feedback.gather import gather
from lossmith.feedback.preferences import Form, Preference, split_by_prompt
from lossmith.files import at_home
from lossmith.losses import KTO, CompletionLoss, OnlineKTO
from lossmith.losses.completion.pairs import GIVEN, Paired
from lossmith.optimization import check_optimizer
from lossmith.policy import Policy, check_model, check_quantization, load_policy
from lossmith.settings.base import LearningRate, Schedule
from lossmith.training.card import of_preferences, write_card
from lossmith.training.clock import Clock
from lossmith.training.going_on import GoingOn, go_on, is_finished, recipe_of
from lossmith.training.keeping import Keeping
from lossmith.training.learner import Learner
from lossmith.training.metrics import in_completions
from lossmith.training.offline.examples import JudgedRollouts, JudgedSet, judged_rollouts
from lossmith.training.offline.preference_scores import (
    PreferenceScores,
    compare,
    evaluate_preferences,
    rows_of,
    score_of,
    verdict,
)
from lossmith.training.recipe import PROVIDED, Recipe, RunSettings, check_lora, checked_loss
from lossmith.training.run import RunFolder, check_disk, disk_needed

__all__ = [
    "PreferencePlan",
    "PreferenceRecipe",
    "PreferenceRun",
    "PreferenceStep",
    "fit_loss",
    "learn_preferences",
    "open_preferences",
    "plan_preferences",
    "resume_preferences",
]

OFFLINE = PROVIDED - {"behavior_logp", "value", "old_value"} | GIVEN
MAKES_LOSS = {"preferences", "form", "skip_bad", "loss", "balance", "inputs"}  # what `fit_loss` makes a loss of
CLASS_RATIO = (1.0, 4 / 3)  # where KTO's paper wants λ_d·n_d / (λ_u·n_u)


class PreferenceRecipe(RunSettings):
    """The settings of a run on preferences. `recipe.toml` in a run folder holds them all."""

    live: ClassVar[tuple[str, ...]] = ("preferences",)
    paths: ClassVar[tuple[str, ...]] = ("preferences", "model", "loss", "runs")
    resumed_by: ClassVar[str] = "lossmith prefer --resume"
    resumed_in_python: ClassVar[str] = "lossmith.resume_preferences"

    preferences: Any = Field(None, description="a preferences file of any tool, a judgement database (.db), or a list")
    form: Literal["auto", "pairs", "rankings", "ratings", "labels"] = Field(
        "auto", description="what is made of judgements; auto: labels for KTO, otherwise pairs"
    )
    held_out: int | float = Field(0.2, gt=0, description="prompts kept for before and after: number or share")
    skip_bad: bool = Field(False, description="leave out and count what cannot be used, instead of stopping at it")

    loss: Any = Field("dpo", description="loss: dpo, ipo, kto, simpo, orpo, cpo, slic, 'dpo(beta=0.3)', ...")
    balance: bool = Field(True, description="KTO: weigh good and bad by their numbers, as its paper asks")

    epochs: int = Field(1, gt=0, description="passes over the preferences")
    preferences_per_step: int = Field(16, gt=0, description="preferences in one optimizer step")
    learning_rate: LearningRate = 5e-6
    schedule: Schedule = "linear"

    @classmethod
    def make(cls, source: str = "recipe", /, **fields: Any) -> Self:
        """A checked recipe, its loss included. RecipeError: an unknown key, a wrong type or range, a wrong loss."""
        recipe = cls.checked(source, fields)
        if recipe.preferences is None:
            raise RecipeError(f"{source}: which preferences? Give a file or a database of judgements.")
        check_optimizer(source, recipe)
        check_lora(source, recipe)
        recipe.policy_loss()
        return recipe

    def policy_loss(self) -> CompletionLoss:
        """The loss that the recipe names. RecipeError: it cannot learn from texts that the policy did not write."""
        loss = checked_loss(self.loss, self.allow_traps, OFFLINE)
        if not isinstance(loss, CompletionLoss) or loss.term.anchor == "old":
            raise RecipeError(
                f"The loss {loss.name!r} weighs completions by how the policy itself sampled them, and a preferences "
                "file holds anyone's texts. Choose a loss of preferences (dpo, ipo, kto, simpo, orpo, ...), or sample "
                f"and score afresh with: lossmith train --loss {loss.name}"
            )
        return loss

    def for_learner(self, steps: int) -> Recipe:
        """What the learner reads: one pass over what it is given, log-probabilities at temperature 1."""
        fields = {key: getattr(self, key) for key in Recipe.model_fields.keys() & type(self).model_fields.keys()}
        fields |= {"steps": steps, "epochs": 1, "temperature": 1.0, "held_out": 1}
        return Recipe.make("recipe", **fields)


# -- before the first step --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferencePlan:
    """A checked recipe and its preferences, split by prompt, before any model is loaded."""

    recipe: PreferenceRecipe
    train: list[Preference]
    held_out: list[Preference]
    notes: list[str]  # what was left out on the way, and what was not read


def plan_preferences(recipe: PreferenceRecipe, held_out_ids: Sequence[str] | None = None) -> PreferencePlan:
    """Read and split. FeedbackError names file and line; RecipeError where too few prompts are held out.

    held_out_ids: of a resumed run, which keeps its held-out prompts whatever was added to the others.
    """
    recipe.policy_loss()
    check_model(recipe.model)
    check_quantization(recipe.model, recipe.quantize)
    gathered = gather(recipe.preferences, _form(recipe), skip_bad=recipe.skip_bad)
    if held_out_ids is not None:
        train, held_out = _split_again(gathered.preferences, set(held_out_ids))
        return PreferencePlan(recipe, train, held_out, gathered.notes)
    try:
        train, held_out = split_by_prompt(gathered.preferences, recipe.held_out, recipe.seed)
    except PromptError as error:
        raise RecipeError(str(error).replace("memory:", "the preferences:", 1)) from None
    if len({p.prompt.content_id for p in held_out}) < 2:
        raise RecipeError(f"held_out = {recipe.held_out} keeps one prompt, and an interval needs at least two.")
    return PreferencePlan(recipe, train, held_out, gathered.notes)


def _split_again(preferences: Sequence[Preference], held_out: set[str]) -> tuple[list[Preference], list[Preference]]:
    """(train, held out) as a run had them. RunError: nothing to train on, or held-out prompts are there no more."""
    train = [p for p in preferences if p.prompt.content_id not in held_out]
    kept = [p for p in preferences if p.prompt.content_id in held_out]
    gone = held_out - {p.prompt.content_id for p in kept}
    if gone or not train:
        raise RunError(
            f"the preferences have changed: {len(gone)} of the run's {len(held_out)} held-out prompts are there no "
            f"more, and {len(train)} preferences of others are left to learn from. Put them back, or start a new run."
        )
    return train, kept


def _form(recipe: PreferenceRecipe) -> Form:
    """What is made of judgements."""
    if recipe.form != "auto":
        return recipe.form
    return "labels" if isinstance(recipe.policy_loss().term, KTO | OnlineKTO) else "pairs"


@dataclass
class PreferenceRun(Keeping):
    """Everything a run on preferences works with. `notes` say what was decided on the way."""

    recipe: PreferenceRecipe
    train: JudgedSet
    held_out: JudgedSet
    policy: Policy
    learner: Learner
    folder: RunFolder
    batches: list[list[int]]  # examples of each step
    notes: list[str]
    going_on: GoingOn = field(default_factory=GoingOn)
    before: PreferenceScores | None = None
    after: PreferenceScores | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def steps(self) -> int:
        return len(self.batches)

    def start(self) -> None:
        """Measure the untrained policy on the held-out preferences; then, in a resumed run, load the checkpoint."""
        if self.before is None:
            self.before = evaluate_preferences(self.learner, self.held_out)
            self.load()

    def finish(self) -> None:
        """Measure again, save the policy, and write summary.json."""
        assert self.before is not None, "a run that was never started has nothing to compare with"
        self.save()  # what a stop from here on goes on from
        self.after = evaluate_preferences(self.learner, self.held_out)
        self.folder.save_policy(self.policy)
        summary = {
            "held_out": compare(self.before, self.after),
            "steps": self.steps,
            "loss": str(self.learner.loss),
            "preferences": {"train": self.train.report(), "held_out": self.held_out.report()},
            "notes": self.notes,
            "policy_checksum": self.policy.checksum(),
            "seconds": time.perf_counter() - self.started,
            **({"accepted_changes": self.going_on.accepted} if self.going_on.accepted else {}),
        }
        write_card(self.folder, self.recipe, self.learner.loss, of_preferences(self.recipe, summary, verdict(summary)))
        self.folder.write_summary(summary)
        self.summary = summary


def open_preferences(
    plan: PreferencePlan, resume: Path | None = None, *, accept_changes: bool = False
) -> PreferenceRun:
    """Load the model, put the preferences into its tokens, and open the run's folder: new, or that of `resume`, where
    its last checkpoint stopped.

    accept_changes: go on although what decided the run is not what it was. RunError: a change that is not accepted.
    """
    recipe = plan.recipe
    folder = None if resume is None else RunFolder.existing(resume)
    policy = load_policy(
        recipe.model,
        device=recipe.device,
        dtype=recipe.dtype,
        chat_template=recipe.chat_template,
        lora=recipe.lora,
        float32_head=recipe.float32_head,
        quantize=recipe.quantize,
    )
    train, held_out = (judged_rollouts(policy, p, skip_bad=recipe.skip_bad) for p in (plan.train, plan.held_out))
    loss, train, held_out, notes = fit_loss(recipe.policy_loss(), train, held_out, balance=recipe.balance)
    notes += plan.notes
    batches = _batches(len(train.examples), recipe)
    if recipe.warmup_steps > len(batches):
        raise RecipeError(f"warmup_steps = {recipe.warmup_steps} exceeds the {len(batches)} steps of this run.")
    settings = recipe.for_learner(len(batches))
    check_disk(recipe.runs if folder is None else folder.path, disk_needed(policy, settings, folder))
    with quiet_traps():  # policy_loss has refused traps, or the recipe allows them
        learner = Learner(policy, loss, settings)
    now = _inputs_of(plan, policy, (train, held_out), len(batches))
    if folder is None:
        folder, going_on = RunFolder.create(recipe, loss.name, now), GoingOn()
    else:
        going_on = go_on(folder, now, recipe, accept_changes)
        if going_on.changed & MAKES_LOSS:
            going_on.changed |= {"loss"}
    return PreferenceRun(recipe, train, held_out, policy, learner, folder, batches, notes, going_on)


def resume_preferences(folder: str | Path, *, accept_changes: bool = False, **objects: Any) -> PreferenceRun:
    """Open a run that stopped where its last checkpoint stopped; `learn_preferences` goes on, as if it had not stopped.

    objects: `preferences` that were a Python object, which no file can hold. RunError: the run is finished; what
    decided it has changed, and accept_changes is not set; another process works on it.
    """
    there = RunFolder.existing(at_home(folder))
    try:
        recipe = recipe_of(there, PreferenceRecipe, objects, {})
        known = Inputs.read(there.path)
        had = {} if known is None else known.known
        is_finished(there, had.get("steps"), " For more epochs, start a new run.")
        plan = plan_preferences(recipe, had.get("held_out"))
        return open_preferences(plan, there.path, accept_changes=accept_changes)
    except BaseException:
        there.close()
        raise


def _inputs_of(plan: PreferencePlan, policy: Policy, examples: Sequence[JudgedSet], steps: int) -> Inputs:
    """Everything that decides what this run learns. Before the policy has learned anything."""
    settings = plan.recipe.written()
    given = [*plan.train, *plan.held_out]
    tokens = [(r.prompt_ids, r.completion_ids) for e in examples for x in e.examples for r in x.rollouts]
    decisive = {
        "the preferences": f"{len(given)} {examples[0].form} {digest(p.as_row() for p in given)}",
        **of_code("loss", settings["loss"]),
        **of_model(policy),
        "the preferences' tokens": digest(tokens),
    }
    held_out = list(dict.fromkeys(p.prompt.content_id for p in plan.held_out))
    return Inputs(settings, decisive, circumstances(policy.device), {"held_out": held_out, "steps": steps})


def _batches(count: int, recipe: PreferenceRecipe) -> list[list[int]]:
    """Row numbers of each step: every epoch shuffled anew by (seed, epoch), cut into parts of nearly equal size."""
    parts = max(1, round(count / recipe.preferences_per_step))
    shuffled = (np.random.default_rng([recipe.seed, epoch]).permutation(count) for epoch in range(recipe.epochs))
    return [part.tolist() for order in shuffled for part in np.array_split(order, parts)]


# -- what the preferences make of a loss ------------------------------------------------------------------------------


def fit_loss(
    loss: CompletionLoss, train: JudgedSet, held_out: JudgedSet, *, balance: bool = True
) -> tuple[CompletionLoss, JudgedSet, JudgedSet, list[str]]:
    """The loss as these preferences ask for it, what it can use of them, and what was decided, in words.

    FeedbackError: preferences that this loss cannot read.
    """
    if isinstance(loss.term, KTO | OnlineKTO):
        return _fit_kto(loss, loss.term, train, held_out, balance)
    notes: list[str] = []
    for part, examples in (("training", train), ("held-out", held_out)):
        if not examples.pairs:
            raise FeedbackError(
                f"the {part} {examples.form} hold no pair of a better and a worse text for one prompt by one "
                f"annotator, and {loss.name} learns from pairs. Use --loss kto, or judge several texts of each prompt."
            )
    if isinstance(loss.term, Paired) and loss.term.labels == "reward" and (train.soft or train.weighed):
        loss = loss.replace(labels="given")
        why = [f"{train.soft} uncertain {train.form}"] if train.soft else []
        why += ["pairs of one judgement share its weight"] if train.weighed else []
        notes.append(f"labels = given: {'; '.join(why)}")
    if isinstance(loss.term, Paired) and loss.term.pairs == "best_worst" and train.form != "pairs":
        notes.append("pairs = best_worst: of each judgement only the best and the worst are read")
    return loss, train, held_out, notes


def _fit_kto(
    loss: CompletionLoss, term: KTO | OnlineKTO, train: JudgedSet, held_out: JudgedSet, balance: bool
) -> tuple[CompletionLoss, JudgedSet, JudgedSet, list[str]]:
    if train.form == "rankings":
        raise FeedbackError(f"{loss.name} reads which texts are good, and a ranking says only which are better.")
    notes = []
    train, held_out = (_decided(examples, term.threshold) for examples in (train, held_out))
    if train.soft:
        notes.append(f"{loss.name} reads the uncertain sides of {train.soft} pairs as certain")
    good = sum(score_of(r) > term.threshold for e in train.examples for r in e.rollouts)
    bad = sum(len(e.rollouts) for e in train.examples) - good
    if not good or not bad:
        raise FeedbackError(
            f"all {good + bad} training texts are {'good' if good else 'bad'}: {loss.name} has nothing to tell apart."
        )
    if balance and term.lam_d == term.lam_u == 1:
        ratio = good / bad
        factor = min(max(ratio, CLASS_RATIO[0]), CLASS_RATIO[1]) / ratio
        weights = {"lam_d": max(factor, 1.0), "lam_u": max(1 / factor, 1.0)}
        loss = loss.replace(**weights)
        weighed = weights["lam_d"] * good / (weights["lam_u"] * bad)
        notes.append(
            f"{good} good and {bad} bad: lam_d = {weights['lam_d']:.3g}, lam_u = {weights['lam_u']:.3g}, so that "
            f"together they weigh {weighed:.3g} to 1 (the paper: 1 to 4/3)"
        )
    return loss, train, held_out, notes


def _decided(examples: JudgedSet, threshold: float) -> JudgedSet:
    """Without ratings right at the threshold, which say neither good nor bad."""
    if examples.form != "ratings":
        return examples
    kept, neither = [], 0
    for e in examples.examples:
        rows = tuple(r for r in e.rollouts if score_of(r) != threshold)
        neither += len(e.rollouts) - len(rows)
        if rows:
            kept.append(JudgedRollouts(rows, e.probability, e.weight))
    left = examples.left_out | ({"ratings in the middle of the scale": neither} if neither else {})
    return JudgedSet(examples.form, kept, examples.texts, left)


# -- the loop ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceStep:
    """One optimizer step: its line in metrics.jsonl."""

    index: int
    record: dict[str, Any]


def learn_preferences(run: PreferenceRun) -> Iterator[PreferenceStep]:
    """One step at a time, each recorded in the run's folder before it is yielded."""
    run.start()
    learner, clock = run.learner, Clock()
    for index in range(run.first_step, run.steps):
        chosen = run.batches[index]
        rollouts, given = rows_of([run.train.examples[i] for i in chosen])
        with clock("update"):
            batch = learner.make_batch(rollouts, given)
            credit = learner.credit(batch)
            update = learner.update(rollouts, batch, credit, index)
        record = {"step": index, "skipped_updates": update.skipped, **in_completions(update.metrics)}
        record |= {f"seconds_{part}": value for part, value in clock.read().items()}
        run.folder.add_metrics(record)
        run.recorded(index + 1)
        yield PreferenceStep(index, record)

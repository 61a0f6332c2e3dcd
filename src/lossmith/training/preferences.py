"""A policy learned straight from preferences, without a reward model: DPO and its kin on a fixed file.

`learn_preferences` yields one step at a time, as `learn` does; nothing is sampled, and no scorer is asked.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lossmith.errors import FeedbackError, PromptError, RecipeError, quiet_traps
from lossmith.feedback.gather import gather
from lossmith.feedback.preferences import Form, Preference, split_by_prompt
from lossmith.intervals import Interval, bears_verdict, mean_of, share_across, share_of
from lossmith.intervals import verdict as said_of
from lossmith.losses import KTO, CompletionLoss, OnlineKTO
from lossmith.losses.pairs import GIVEN, Paired
from lossmith.policy import Policy, check_model, load_policy
from lossmith.rollouts import Rollout
from lossmith.training.can_learn import check_optimizer
from lossmith.training.clock import Clock
from lossmith.training.examples import Example, Examples, make_examples
from lossmith.training.learner import Learner
from lossmith.training.loop import disk_needed
from lossmith.training.metrics import in_completions
from lossmith.training.recipe import PROVIDED, Recipe, Settings, checked_loss
from lossmith.training.run import RunFolder, check_disk

__all__ = [
    "PreferencePlan",
    "PreferenceRecipe",
    "PreferenceRun",
    "PreferenceStep",
    "Standing",
    "fit_loss",
    "learn_preferences",
    "open_preferences",
    "plan_preferences",
    "verdict",
]

OFFLINE = PROVIDED - {"behavior_logp", "value", "old_value"} | GIVEN
CLASS_RATIO = (1.0, 4 / 3)  # where KTO's paper wants λ_d·n_d / (λ_u·n_u)


class PreferenceRecipe(Settings):
    """The settings of a run on preferences. `recipe.toml` in a run folder holds them all."""

    live: ClassVar[tuple[str, ...]] = ("preferences",)
    paths: ClassVar[tuple[str, ...]] = ("preferences", "model", "loss", "runs")

    preferences: Any = Field(None, description="a preferences file of any tool, a judgement database (.db), or a list")
    form: Literal["auto", "pairs", "rankings", "ratings", "labels"] = Field(
        "auto", description="what is made of judgements; auto: labels for KTO, otherwise pairs"
    )
    held_out: int | float = Field(0.2, gt=0, description="prompts kept for before and after: number or share")
    skip_bad: bool = Field(False, description="leave out and count what cannot be used, instead of stopping at it")

    model: str = Field("default", description="policy: 'default' (SmolLM2-135M-Instruct), a folder, or a hub name")
    device: str = Field("auto", description="auto, cpu, cuda, mps, ...")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute type; auto: bfloat16 where the machine is faster with it. Weights stay float32"
    )

    chat_template: str | None = Field(None, description="which of the model's chat templates, where it has several")

    loss: Any = Field("dpo", description="loss: dpo, ipo, kto, simpo, orpo, cpo, slic, 'dpo(beta=0.3)', ...")
    allow_traps: bool = Field(False, description="train with a loss that is known to mislead")
    balance: bool = Field(True, description="KTO: weigh good and bad by their numbers, as its paper asks")

    epochs: int = Field(1, gt=0, description="passes over the preferences")
    preferences_per_step: int = Field(16, gt=0, description="preferences in one optimiser step")
    learning_rate: float = Field(5e-6, ge=0, description="AdamW's learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="learning rate over the steps")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients longer than this are scaled down to it")
    micro_batch_tokens: int = Field(
        1024, gt=0, description="tokens in one forward and backward pass; changes no result"
    )
    memory_gb: float | None = Field(
        None, gt=0, description="memory that training may take: beyond it, layers are run again in the backward pass"
    )

    seed: int = Field(0, ge=0, description="decides order and split")
    runs: str = Field("runs", description="folder in which the run gets a folder of its own")
    name: str | None = Field(None, description="name of the run's folder; made from the time and loss if not given")

    @classmethod
    def make(cls, source: str = "recipe", /, **fields: Any) -> Self:
        """A checked recipe, its loss included. RecipeError: an unknown key, a wrong type or range, a wrong loss."""
        recipe = cls.checked(source, fields)
        if recipe.preferences is None:
            raise RecipeError(f"{source}: which preferences? Give a file or a database of judgements.")
        check_optimizer(source, recipe)
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
        fields |= {
            "steps": steps,
            "epochs": 1,
            "temperature": 1.0,
            "held_out": 1,
            "checkpoint_every": 0,
            "checkpoint_minutes": 0,
        }
        return Recipe.make("recipe", **fields)


# -- before the first step --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferencePlan:
    """A checked recipe and its preferences, split by prompt, before any model is loaded."""

    recipe: PreferenceRecipe
    train: list[Preference]
    held_out: list[Preference]
    notes: list[str]  # what was left out on the way, and what was not read


def plan_preferences(recipe: PreferenceRecipe) -> PreferencePlan:
    """Read and split. FeedbackError names file and line; RecipeError where too few prompts are held out."""
    recipe.policy_loss()
    check_model(recipe.model)
    gathered = gather(recipe.preferences, _form(recipe), skip_bad=recipe.skip_bad)
    try:
        train, held_out = split_by_prompt(gathered.preferences, recipe.held_out, recipe.seed)
    except PromptError as error:
        raise RecipeError(str(error).replace("memory:", "the preferences:", 1)) from None
    if len({p.prompt.content_id for p in held_out}) < 2:
        raise RecipeError(f"held_out = {recipe.held_out} keeps one prompt, and an interval needs at least two.")
    return PreferencePlan(recipe, train, held_out, gathered.notes)


def _form(recipe: PreferenceRecipe) -> Form:
    """What is made of judgements."""
    if recipe.form != "auto":
        return recipe.form
    return "labels" if isinstance(recipe.policy_loss().term, KTO | OnlineKTO) else "pairs"


@dataclass
class PreferenceRun:
    """Everything a run on preferences works with. `notes` say what was decided on the way."""

    recipe: PreferenceRecipe
    train: Examples
    held_out: Examples
    policy: Policy
    learner: Learner
    folder: RunFolder
    batches: list[list[int]]  # examples of each step
    notes: list[str]
    before: Standing | None = None
    after: Standing | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """Measure the untrained policy on the held-out preferences."""
        self.before = self.before or stand(self.learner, self.held_out)

    def finish(self) -> None:
        """Measure again, save the policy, and write summary.json."""
        assert self.before is not None, "a run that was never started has nothing to compare with"
        self.after = stand(self.learner, self.held_out)
        self.policy.save(self.folder.path / "policy")
        self.summary = {
            "held_out": compare(self.before, self.after),
            "steps": len(self.batches),
            "loss": str(self.learner.loss),
            "preferences": {"train": self.train.report(), "held_out": self.held_out.report()},
            "notes": self.notes,
            "policy_checksum": self.policy.checksum(),
            "seconds": time.perf_counter() - self.started,
        }
        self.folder.write_text("summary.json", json.dumps(self.summary, indent=2) + "\n")


def open_preferences(plan: PreferencePlan) -> PreferenceRun:
    """Load the model, put the preferences into its tokens, and open the run's folder."""
    recipe = plan.recipe
    policy = load_policy(
        recipe.model, device=recipe.device, compute_dtype=recipe.dtype, chat_template=recipe.chat_template
    )
    train, held_out = (make_examples(policy, p, skip_bad=recipe.skip_bad) for p in (plan.train, plan.held_out))
    loss, train, held_out, notes = fit_loss(recipe.policy_loss(), train, held_out, balance=recipe.balance)
    notes += plan.notes
    batches = _batches(len(train.examples), recipe)
    if recipe.warmup_steps > len(batches):
        raise RecipeError(f"warmup_steps = {recipe.warmup_steps} exceeds the {len(batches)} steps of this run.")
    settings = recipe.for_learner(len(batches))
    check_disk(recipe.runs, disk_needed(policy, settings))
    with quiet_traps():  # policy_loss has refused traps, or the recipe allows them
        learner = Learner(policy, loss, settings)
    folder = RunFolder.create(recipe, loss.name)
    return PreferenceRun(recipe, train, held_out, policy, learner, folder, batches, notes)


def _batches(count: int, recipe: PreferenceRecipe) -> list[list[int]]:
    """Row numbers of each step: every epoch shuffled anew by (seed, epoch), cut into parts of nearly equal size."""
    parts = max(1, round(count / recipe.preferences_per_step))
    shuffled = (np.random.default_rng([recipe.seed, epoch]).permutation(count) for epoch in range(recipe.epochs))
    return [part.tolist() for order in shuffled for part in np.array_split(order, parts)]


# -- what the preferences make of a loss ------------------------------------------------------------------------------


def fit_loss(
    loss: CompletionLoss, train: Examples, held_out: Examples, *, balance: bool = True
) -> tuple[CompletionLoss, Examples, Examples, list[str]]:
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
        loss = loss.set({"labels": "given"})
        why = [f"{train.soft} uncertain {train.form}"] if train.soft else []
        why += ["pairs of one judgement share its weight"] if train.weighed else []
        notes.append(f"labels = given: {'; '.join(why)}")
    if isinstance(loss.term, Paired) and loss.term.pairs == "best_worst" and train.form != "pairs":
        notes.append("pairs = best_worst: of each judgement only the best and the worst are read")
    return loss, train, held_out, notes


def _fit_kto(
    loss: CompletionLoss, term: KTO | OnlineKTO, train: Examples, held_out: Examples, balance: bool
) -> tuple[CompletionLoss, Examples, Examples, list[str]]:
    if train.form == "rankings":
        raise FeedbackError(f"{loss.name} reads which texts are good, and a ranking says only which are better.")
    notes = []
    train, held_out = (_decided(examples, term.threshold) for examples in (train, held_out))
    if train.soft:
        notes.append(f"{loss.name} reads the uncertain sides of {train.soft} pairs as certain")
    good = sum(_score(r) > term.threshold for e in train.examples for r in e.rollouts)
    bad = sum(len(e.rollouts) for e in train.examples) - good
    if not good or not bad:
        raise FeedbackError(
            f"all {good + bad} training texts are {'good' if good else 'bad'}: {loss.name} has nothing to tell apart."
        )
    if balance and term.lam_d == term.lam_u == 1:
        ratio = good / bad
        factor = min(max(ratio, CLASS_RATIO[0]), CLASS_RATIO[1]) / ratio
        weights = {"lam_d": max(factor, 1.0), "lam_u": max(1 / factor, 1.0)}
        loss = loss.set(weights)
        weighed = weights["lam_d"] * good / (weights["lam_u"] * bad)
        notes.append(
            f"{good} good and {bad} bad: lam_d = {weights['lam_d']:.3g}, lam_u = {weights['lam_u']:.3g}, so that "
            f"together they weigh {weighed:.3g} to 1 (the paper: 1 to 4/3)"
        )
    return loss, train, held_out, notes


def _decided(examples: Examples, threshold: float) -> Examples:
    """Without ratings right at the threshold, which say neither good nor bad."""
    if examples.form != "ratings":
        return examples
    kept, neither = [], 0
    for e in examples.examples:
        rows = tuple(r for r in e.rollouts if _score(r) != threshold)
        neither += len(e.rollouts) - len(rows)
        if rows:
            kept.append(Example(rows, e.probability, e.weight))
    left = examples.left_out | ({"ratings in the middle of the scale": neither} if neither else {})
    return Examples(examples.form, kept, examples.texts, left)


def _score(rollout: Rollout) -> float:
    assert rollout.score is not None and rollout.score.value is not None
    return float(rollout.score.value)


# -- held-out preferences ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """A policy on held-out preferences; each prompt's mean is the unit of the statistics.

    accuracy   share of pairs whose better text has the greater score of the loss (its log-ratio, or what it compares);
               a tie counts one half. Where judgements hold no pairs: of a good and a bad text of any two prompts
    contributions  {prompt: what it adds to the accuracy}; their mean is the accuracy
    chosen_logp, rejected_logp  log-probability (nats) of the better and the worse texts
    """

    accuracy: Interval
    contributions: dict[str, float]
    chosen_logp: dict[str, float]
    rejected_logp: dict[str, float]
    loss: float


@torch.no_grad()
def stand(learner: Learner, examples: Examples) -> Standing:
    """Measure the policy as it is."""
    loss = learner.loss
    assert isinstance(loss, CompletionLoss)
    rollouts, given = _rows(examples.examples)
    batch = learner.formulate(rollouts, given)
    batch = batch.replace(logp=learner.outputs(learner.policy, rollouts, frozenset()).logp)
    at = loss.completions(batch)
    score = loss.term.score(at) if isinstance(loss.term, Paired) else at.log_ratio
    reward = torch.tensor([_score(r) for r in rollouts], device=score.device)
    pairs = _pairs(examples)
    chosen = {w for w, _ in pairs} if pairs else {i for i, r in enumerate(reward.tolist()) if r > 0.5}
    rejected = {loser for _, loser in pairs} if pairs else set(range(len(rollouts))) - chosen
    logp = batch.require("logp", loss.name).sum(1).tolist()
    ids = [r.prompt.content_id for r in rollouts]
    outcomes = _outcomes(score.tolist(), pairs or _ordered(reward.tolist()), ids)
    if pairs:
        by_prompt = _by_prompt([(name, value) for name, _, value in outcomes])
        accuracy = share_of(list(by_prompt.values()), len(outcomes))
    else:
        accuracy, by_prompt = share_across(outcomes)
    return Standing(
        accuracy=accuracy,
        contributions=by_prompt,
        chosen_logp=_by_prompt([(ids[i], logp[i]) for i in sorted(chosen)]),
        rejected_logp=_by_prompt([(ids[i], logp[i]) for i in sorted(rejected)]),
        loss=float(loss(batch).loss),
    )


def _pairs(examples: Examples) -> list[tuple[int, int]]:
    """(better, worse) row numbers within each judgement; a tie of the judge's is none."""
    found, start = [], 0
    for e in examples.examples:
        found += [(start + i, start + j) for i, j in (e.pairs if e.probability != 0.5 else [])]
        start += len(e.rollouts)
    return found


def _ordered(reward: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) row numbers of any two texts of which one was found better, whatever their prompts."""
    return [(i, j) for i, x in enumerate(reward) for j, y in enumerate(reward) if x > y]


def _outcomes(
    score: Sequence[float], pairs: Sequence[tuple[int, int]], ids: Sequence[str]
) -> list[tuple[str, str, float]]:
    """(prompt of the better, prompt of the worse, whether the score says so too; a tie one half)."""
    return [(ids[w], ids[v], (score[w] > score[v]) + 0.5 * (score[w] == score[v])) for w, v in pairs]


def _by_prompt(values: Sequence[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for name, value in values:
        found.setdefault(name, []).append(value)
    return {name: math.fsum(several) / len(several) for name, several in found.items()}


def compare(before: Standing, after: Standing) -> dict[str, Any]:
    """Before, after and the paired difference, prompt by prompt, with 95% intervals."""

    def change(first: dict[str, float], second: dict[str, float], span: float) -> dict[str, Any]:
        return mean_of([second[k] - first[k] for k in first if k in second], within=(-span, span)).as_dict()

    said: dict[str, Any] = {}
    for when, one in (("before", before), ("after", after)):
        said[when] = {"accuracy": one.accuracy.as_dict(), "loss": one.loss}
        for side in ("chosen_logp", "rejected_logp"):
            said[when][side] = mean_of(list(getattr(one, side).values())).mean
    said["difference"] = {"accuracy": change(before.contributions, after.contributions, 1.0)} | {
        side: change(getattr(before, side), getattr(after, side), 0.0) for side in ("chosen_logp", "rejected_logp")
    }
    return said


# -- the loop ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceStep:
    """One optimiser step: its line in metrics.jsonl."""

    index: int
    record: dict[str, Any]


def learn_preferences(run: PreferenceRun) -> Iterator[PreferenceStep]:
    """One step at a time, each recorded in the run's folder before it is yielded."""
    run.start()
    clock = Clock()
    for index, chosen in enumerate(run.batches):
        rollouts, given = _rows([run.train.examples[i] for i in chosen])
        with clock("update"):
            update = run.learner.update(rollouts, index, given)
        record = {"step": index, "skipped_updates": update.skipped, **in_completions(update.metrics)}
        record |= {f"seconds_{part}": value for part, value in clock.read().items()}
        run.folder.add_metrics(record)
        yield PreferenceStep(index, record)


def _rows(examples: Sequence[Example]) -> tuple[list[Rollout], dict[str, Tensor]]:
    """The rollouts of examples, and what the batch must know of them: a judgement is a group, whatever its prompt."""
    rollouts = [dataclasses.replace(r, sample=1000 * k + r.sample) for k, e in enumerate(examples) for r in e.rollouts]

    def each(value: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor([value(k, e) for k, e in enumerate(examples) for _ in e.rollouts], dtype=dtype)

    return rollouts, {
        "group": each(lambda k, e: k, torch.int64),
        "pair_probability": each(lambda k, e: e.probability, torch.float32),
        "pair_weight": each(lambda k, e: e.weight, torch.float32),
    }


def verdict(summary: dict[str, Any]) -> list[str]:
    """What the paired differences say, in sentences."""
    difference = summary["held_out"]["difference"]
    said = [said_of(difference["accuracy"], "held-out preference accuracy")]
    fell = difference["chosen_logp"]
    if bears_verdict(fell) and fell["ci95_high"] < 0:
        said.append(
            f"Warning: the preferred texts themselves became less likely ({fell['mean']:+.2f} nats a text): a margin "
            "grows as well when both sides fall. A smaller learning rate, a larger beta, or a loss that imitates the "
            "winner (orpo, cpo) helps."
        )
    return said

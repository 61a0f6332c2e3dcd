"""Training a reward model: preferences in, a frozen folder out."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lossmith import __version__
from lossmith.errors import FeedbackError, RecipeError, RunError, nearest
from lossmith.feedback.gather import gather
from lossmith.feedback.preferences import Form, Preference, form_of, split_by_prompt
from lossmith.files import at_home, check_writable
from lossmith.intervals import doubt, in_words
from lossmith.reward_training import losses
from lossmith.reward_training.examples import Example, make_examples, said_nothing
from lossmith.reward_training.measure import Measured, measure, plot_measured
from lossmith.reward_training.model import Scoring, load_scoring, token_parts
from lossmith.rewards.seal import MANIFEST, checksums, sha256

__all__ = ["RewardRecipe", "loss_of", "train_reward_model"]

Loss = Literal["auto", "bradley_terry", "plackett_luce", "all_pairs", "mean_squared", "logistic"]
DEFAULT_LOSS: dict[Form, str] = {
    "pairs": "bradley_terry", "rankings": "plackett_luce", "ratings": "mean_squared", "labels": "logistic",
}  # fmt: skip
HUGE = 1_000_000_000  # no count of a training reaches it
_Trained = tuple[list[Tensor], list[Example], dict[str, Any]]
READS: dict[str, set[Form]] = {
    "bradley_terry": {"pairs"}, "plackett_luce": {"pairs", "rankings"}, "all_pairs": {"pairs", "rankings"},
    "mean_squared": {"ratings"}, "logistic": {"labels"},
}  # fmt: skip


@dataclass(frozen=True)
class RewardRecipe:
    """The settings of reward-model training.

    train_layers: None trains the whole model; k its last k layers and the head. ensemble: how many members, which
    differ by their seed, or by the prompts that they see (`ensemble_by`). combine: how an ensemble's members make one
    score: mean, worst (the least), or uncertain (mean - penalty · variance).
    """

    model: str = "default"
    form: Form | None = None
    loss: Loss = "auto"
    centring: float = 0.01
    epochs: int = 2
    comparisons_per_step: int = 8
    learning_rate: float = 2e-5
    train_layers: int | None = None
    held_out: float = 0.2
    ensemble: int = 1
    ensemble_by: Literal["seeds", "subsets"] = "seeds"
    combine: Literal["mean", "worst", "uncertain"] = "mean"
    penalty: float = 1.0
    normalise: bool = True
    max_length: int | None = None
    skip_bad: bool = False
    micro_batch_tokens: int = 2048
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for key, low in (("epochs", 1), ("comparisons_per_step", 1), ("ensemble", 1), ("micro_batch_tokens", 1)):
            if getattr(self, key) < low:
                raise RecipeError(f"{key} = {getattr(self, key)}, but must be at least {low}.")
            if getattr(self, key) >= HUGE:
                raise RecipeError(f"{key} = {getattr(self, key)} is too large: it must be below {HUGE}.")
        for key in ("centring", "learning_rate", "penalty"):
            if not 0 <= getattr(self, key) < math.inf:
                raise RecipeError(f"{key} = {getattr(self, key)}, but must be finite and at least 0.")
        if not 1e-12 <= self.learning_rate <= 1:
            does = "destroys the model" if self.learning_rate > 1 else "changes nothing"
            raise RecipeError(f"learning_rate = {self.learning_rate:g} {does}. Usual is 1e-6 to 1e-4.")
        for key, known in (("ensemble_by", ("seeds", "subsets")), ("combine", ("mean", "worst", "uncertain"))):
            if getattr(self, key) not in known:
                raise RecipeError(f"{key} = {getattr(self, key)!r}.{nearest(getattr(self, key), known)}")
        if self.loss != "auto" and self.loss not in READS:
            raise RecipeError(f"loss = {self.loss!r}.{nearest(self.loss, [*READS, 'auto'])}")


def loss_of(scores: Tensor, example: Example, name: str, centring: float) -> Tensor:
    """The loss of one example's scores [rows], its centring included; not yet weighted."""
    if example.target is not None:
        target = torch.full_like(scores, example.target)
        kind = losses.logistic(scores, target > 0.5) if name == "logistic" else losses.mean_squared(scores, target)
        return kind.sum()
    if name == "bradley_terry":
        value = losses.bradley_terry(scores[0], scores[1], example.probability, example.margin)
    else:
        value = (losses.plackett_luce if name == "plackett_luce" else losses.all_pairs)(scores, example.tiers)
    return value + centring * losses.centring(scores)


# -- training ---------------------------------------------------------------------------------------------------------


def train_reward_model(
    source: str | Path,
    target: Path,
    recipe: RewardRecipe,
    on_step: Callable[[str], None] = lambda line: None,
    busy: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Train, measure on held-out prompts, and write `target`; returns the manifest.

    on_step is given lines for people, busy what is being done and how far it is. The folder is complete or absent.
    RunError: it exists already. FeedbackError: preferences that cannot be learned from. PolicyError: the model.
    """
    target = at_home(target)
    if target.exists():
        raise RunError(f"{target} exists, and a reward model is never overwritten. Choose another folder with -o.")
    check_writable(target)
    gathered = gather(source, recipe.form, skip_bad=recipe.skip_bad)
    preferences, report = gathered.preferences, "\n".join(gathered.notes)
    nothing = said_nothing(preferences)
    if nothing:
        raise FeedbackError(f"{source} holds no signal: {nothing}. A reward model could only learn a constant.")
    name = _loss_name(recipe.loss, form_of(preferences, str(source)))
    train, held_out = split_by_prompt(preferences, recipe.held_out, recipe.seed)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shared = {
        "trained": True,
        "lossmith": __version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "loss": name,
        "settings": dataclasses.asdict(recipe),
        "data": {
            "source": str(source),
            "sha256": _digest(preferences),
            "train": len(train),
            "held_out": len(held_out),
            "left_out": report,
        },
        "normalise": recipe.normalise,
    }
    if report:
        on_step(f"{source}: {report}")
    on_step(f"{len(train)} {form_of(preferences)} to train on, {len(held_out)} held out (by prompt); loss {name}")
    training = _Training(recipe, name, shared, on_step, busy)
    run = training.one if recipe.ensemble == 1 else training.ensemble
    try:
        scores, examples, manifest = run(train, held_out, partial)
        measured = measure(examples, scores)
        if recipe.ensemble > 1:
            on_step(f"the {recipe.ensemble} together: {summary(measured)}")
        doubted = doubt(measured.accuracy.as_dict())
        if doubted:
            on_step(
                f"! {doubted}.\n  `lossmith train` refuses it unless told to accept a weak scorer. Judge more outputs, "
                "and train it again."
            )
        plot_measured(measured, partial / "report.svg", target.name)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


@dataclass(frozen=True)
class _Training:
    """What all members of a reward model have in common. Both ways give (held-out scores, examples, manifest)."""

    recipe: RewardRecipe
    loss: str
    shared: dict[str, Any]  # what every manifest says
    say: Callable[[str], None]
    busy: Callable[[str, int, int], None]

    def ensemble(self, train: list[Preference], held_out: list[Preference], folder: Path) -> _Trained:
        """Members that differ by seed or by the prompts they saw, and a manifest over them."""
        recipe, members, everything = self.recipe, [], []
        for k in range(recipe.ensemble):
            self.say(f"member {k + 1} of {recipe.ensemble}")
            seen = train if recipe.ensemble_by == "seeds" else _subset(train, recipe.seed, k)
            (folder / f"member-{k}").mkdir()
            own = dataclasses.replace(recipe, seed=recipe.seed + k)
            alike = self.shared | {"normalise": True}  # or the member with the largest numbers would decide
            member = _Training(own, self.loss, alike, self.say, self.busy)
            scores, examples, manifest = member.one(seen, held_out, folder / f"member-{k}")
            scale = manifest["scale"]
            everything.append([(s - scale["mean"]) / scale["std"] for s in scores])
            members.append(f"member-{k}")
        mean = [torch.stack(several).mean(0) for several in zip(*everything, strict=True)]
        manifest = self.shared | {
            "ensemble": members,
            "combine": recipe.combine,
            "penalty": recipe.penalty,
            "held_out": measure(examples, mean).as_dict(),
            "files": {f"{name}/{MANIFEST}": sha256(folder / name / MANIFEST) for name in members},
        }
        _write_manifest(folder, manifest)
        return mean, examples, manifest

    def one(self, train: list[Preference], held_out: list[Preference], folder: Path) -> _Trained:
        """One model, saved in the folder."""
        recipe = self.recipe
        scoring = load_scoring(recipe.model, recipe.seed, device=recipe.device, dtype=recipe.dtype)
        reads = min(recipe.max_length or scoring.max_length, scoring.max_length)
        learn, left = make_examples(train, scoring.tokenizer, reads, skip_bad=recipe.skip_bad)
        unseen, lost = make_examples(held_out, scoring.tokenizer, reads, skip_bad=recipe.skip_bad)
        for why, count in sorted((left + lost).items()):
            self.say(f"{count} left out: {why}")
        for done, total, line in fit(scoring, learn, recipe, self.loss):
            self.busy("training, step", done, total)
            if line:
                self.say(line)
        self.busy("scoring what was held out, and what was trained on", 0, 0)
        scoring.dtype = torch.float32  # what a scorer computes in
        scores = scoring.all_scores(unseen, recipe.micro_batch_tokens)
        if not all(s.isfinite().all() for s in scores):
            raise RunError("the trained model's scores are not finite; lower learning_rate.")
        found = torch.cat(scoring.all_scores(learn, recipe.micro_batch_tokens))
        scoring.save(folder)
        measured = measure(unseen, scores)
        manifest = self.shared | {
            "held_out": measured.as_dict(),
            "scale": {"mean": float(found.mean()), "std": max(float(found.std()), 1e-6)},
            "files": checksums(folder),
        }
        _write_manifest(folder, manifest)
        self.say(summary(measured))
        return scores, unseen, manifest


def fit(scoring: Scoring, examples: list[Example], recipe: RewardRecipe, name: str) -> Iterator[tuple[int, int, str]]:
    """Minimise the weighted mean loss; yields (steps done, of how many, a line for people now and then)."""
    scoring.freeze_below(recipe.train_layers)
    trained = [p for p in scoring.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    parts = max(1, round(len(examples) / recipe.comparisons_per_step))
    total = recipe.epochs * parts
    warmup = max(1, total // 20)
    done, recent = 0, []
    for epoch in range(recipe.epochs):
        order = np.random.default_rng([recipe.seed, epoch]).permutation(len(examples))
        for rows in np.array_split(order, parts):
            optimizer.zero_grad(set_to_none=True)
            recent.append(accumulate(scoring, [examples[i] for i in rows], recipe, name))
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            if not torch.isfinite(norm):
                raise RunError(f"step {done + 1}: the gradient is not finite; lower learning_rate.")
            rate = min((done + 1) / warmup, (total - done) / max(1, total - warmup))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate
            optimizer.step()
            done += 1
            line = ""
            if done % max(1, total // 10) == 0 or done == total:
                line = f"step {done:>4}/{total}  loss {sum(recent) / len(recent):.4f}"
                recent = []
            yield done, total, line


def accumulate(scoring: Scoring, examples: Sequence[Example], recipe: RewardRecipe, name: str) -> float:
    """Add the gradient of the examples' weighted mean loss, micro-batch by micro-batch; returns its value."""
    weights = sum(e.weight for e in examples)
    value = 0.0
    for part in token_parts(examples, recipe.micro_batch_tokens):
        scores = scoring.scores([row for e in part for row in e.rows]).split([len(e.rows) for e in part])
        terms = [e.weight * loss_of(s, e, name, recipe.centring) for e, s in zip(part, scores, strict=True)]
        loss = torch.stack(terms).sum() / weights
        loss.backward()
        value += float(loss.detach())
    return value


def _loss_name(wanted: Loss, form: Form) -> str:
    name = DEFAULT_LOSS[form] if wanted == "auto" else wanted
    if form not in READS[name]:
        fitting = sorted(loss for loss, forms in READS.items() if form in forms)
        raise RecipeError(f"loss = {name!r} cannot read {form}; it reads {', '.join(sorted(READS[name]))}. For {form}: "
                          f"{', '.join(fitting)}.")  # fmt: skip
    return name


def _subset(preferences: list[Preference], seed: int, member: int) -> list[Preference]:
    """Four fifths of the prompts, another draw for each member."""
    ids = sorted({p.prompt.content_id for p in preferences})
    kept = np.random.default_rng([seed, member]).permutation(ids)[: max(1, round(0.8 * len(ids)))]
    return [p for p in preferences if p.prompt.content_id in set(kept.tolist())]


def _digest(preferences: Sequence[Preference]) -> str:
    text = "\n".join(json.dumps(p.as_row(), sort_keys=True) for p in preferences)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def summary(measured: Measured) -> str:
    """The held-out figures in words, in lines that a terminal of 80 columns shows whole."""
    said = measured.as_dict()
    accuracy = said["accuracy"]

    def number(x: float | None, form: str = ".3f") -> str:
        return "?" if x is None else format(x, form)

    return (
        f"held-out accuracy {number(accuracy['mean'])} (95% {in_words(accuracy)}; {accuracy['n']} prompts, "
        f"{said['pairs']} pairs)\n"
        f"  log-loss {number(said['log_loss'])} nats a pair; calibration error {number(said['calibration_error'])}\n"
        f"  rank correlation of score and length {number(said['length_correlation'], '+.2f')}; scores "
        f"{said['score_mean']:+.2f} ± {said['score_std']:.2f}"
    )

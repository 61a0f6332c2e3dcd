"""Training a reward model: preferences in, a frozen folder out."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossmith import __version__
from lossmith.durable.inputs import Inputs, circumstances, digest, of_code
from lossmith.durable.stopping import Stopping
from lossmith.errors import FeedbackError, RecipeError, RunError
from lossmith.feedback.gather import gather
from lossmith.feedback.preferences import Form, Preference, form_of, split_by_prompt
from lossmith.files import at_home, check_writable, sha256
from lossmith.intervals import doubt, in_words
from lossmith.policy.load import find_device
from lossmith.reward_model.evaluate import Measured, measure, plot_measured
from lossmith.reward_model.fit import Diverged, Fit
from lossmith.reward_model.model import load_scoring
from lossmith.reward_model.recipe import DEFAULT_LOSS, READS, Loss, RewardRecipe
from lossmith.reward_model.scored_texts import ScoredTexts, make_scored_texts, said_nothing
from lossmith.reward_model.under_way import UnderWay
from lossmith.scorers.seal import MANIFEST, checksums

__all__ = ["RewardRecipe", "train_reward_model"]

_Trained = tuple[list[Tensor], list[ScoredTexts], dict[str, Any]]


def train_reward_model(
    source: str | Path,
    target: Path,
    recipe: RewardRecipe,
    on_step: Callable[[str], None] = lambda line: None,
    busy: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Train, measure on held-out prompts, and write `target`; returns the manifest.

    on_step is given lines for people, busy what is being done and how far it is. The folder is complete or absent;
    whatever ends the training early, Ctrl-C and SIGTERM included, what there is of it is kept beside it, and the same
    call goes on with it. RunError: it exists already; what is kept is of another training. FeedbackError:
    preferences that cannot be learned from. PolicyError: the model.
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
    shared = {
        "trained": True,
        "lossmith": __version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "loss": name,
        "settings": recipe.model_dump(),
        "data": {
            "source": str(source),
            "sha256": _digest(preferences),
            "train": len(train),
            "held_out": len(held_out),
            "left_out": report,
        },
        "normalize": recipe.normalize,
    }
    if report:
        on_step(f"{source}: {report}")
    on_step(f"{len(train)} {form_of(preferences)} to train on, {len(held_out)} held out (by prompt); loss {name}")
    with Stopping() as stop:
        work = UnderWay(target, _inputs_of(recipe, shared), recipe.checkpoint_minutes, stop)
        for note in work.notes:
            on_step(note)
        training = _Training(recipe, name, shared, work, on_step, busy)
        run = training.one if recipe.ensemble == 1 else training.ensemble
        try:
            scores, examples, manifest = run(train, held_out, work.model)
            measured = measure(examples, scores)
            if recipe.ensemble > 1:
                on_step(f"the {recipe.ensemble} together: {summary(measured)}")
            _warn(measured, on_step)
            plot_measured(measured, work.model / "report.svg", target.name)
            work.finish()
        except Diverged:
            work.discard()
            raise
        except BaseException as error:
            work.stopped(error)
            raise
    return manifest


def _warn(measured: Measured, on_step: Callable[[str], None]) -> None:
    """Say it of a model that may be no better than chance."""
    doubted = doubt(measured.accuracy.as_dict())
    if doubted:
        on_step(
            f"! {doubted}.\n  `lossmith train` refuses it unless told to accept a weak scorer. Judge more outputs, "
            "and train it again."
        )


def _inputs_of(recipe: RewardRecipe, shared: dict[str, Any]) -> Inputs:
    """What the model follows from."""
    settings = {key: value for key, value in recipe.model_dump().items() if key not in recipe.free}
    body = at_home(recipe.model)
    files = of_code("body", body if body.is_dir() else recipe.model)
    decisive = {"the preferences": shared["data"]["sha256"], "the model's files": digest(sorted(files.values()))}
    return Inputs(settings, decisive, circumstances(find_device(recipe.device)))


@dataclass(frozen=True)
class _Training:
    """What all members of a reward model have in common. Both ways give (held-out scores, examples, manifest)."""

    recipe: RewardRecipe
    loss: str
    shared: dict[str, Any]  # what every manifest says
    work: UnderWay
    say: Callable[[str], None]
    busy: Callable[[str, int, int], None]
    number: int = 0  # of the member

    def ensemble(self, train: list[Preference], held_out: list[Preference], folder: Path) -> _Trained:
        """Members that differ by seed or by the prompts they saw, and a manifest over them."""
        recipe, members, everything = self.recipe, [], []
        for k in range(recipe.ensemble):
            self.say(f"member {k + 1} of {recipe.ensemble}")
            seen = train if recipe.ensemble_by == "seeds" else _subset(train, recipe.seed, k)
            own = recipe.model_copy(update={"seed": recipe.seed + k})
            alike = self.shared | {"normalize": True}  # or the member with the largest numbers would decide
            member = _Training(own, self.loss, alike, self.work, self.say, self.busy, k)
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
        learn, left = make_scored_texts(train, scoring.tokenizer, reads, skip_bad=recipe.skip_bad)
        unseen, lost = make_scored_texts(held_out, scoring.tokenizer, reads, skip_bad=recipe.skip_bad)
        for why, count in sorted((left + lost).items()):
            self.say(f"{count} left out: {why}")
        known = self.work.scores(self.number, folder)
        if known is not None:
            self.say("finished before")
            manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
            return known, unseen, manifest
        fit = Fit(scoring, learn, recipe, self.loss)
        for line in self.work.train(self.number, fit):
            self.busy("training, step", fit.done, fit.total)
            if line:
                self.say(line)
        self.busy("scoring what was held out, and what was trained on", 0, 0)
        scoring.dtype = torch.float32  # what a scorer computes in
        scores = scoring.all_scores(unseen, recipe.micro_batch_tokens)
        if not all(s.isfinite().all() for s in scores):
            raise Diverged("the trained model's scores are not finite; lower learning_rate.")
        found = torch.cat(scoring.all_scores(learn, recipe.micro_batch_tokens))
        measured = measure(unseen, scores)
        manifest = self.shared | {
            "held_out": measured.as_dict(),
            "scale": {"mean": float(found.mean()), "std": max(float(found.std()), 1e-6)},
        }

        def write(place: Path) -> None:
            scoring.save(place)
            manifest["files"] = checksums(place)
            _write_manifest(place, manifest)

        self.work.finish_member(self.number, folder, scores, write)
        self.say(summary(measured))
        return scores, unseen, manifest


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

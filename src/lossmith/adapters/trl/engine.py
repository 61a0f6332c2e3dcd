"""`lossmith train RECIPE --engine trl`: TRL's GRPOTrainer samples and takes the steps of a run.

The prompts of each round and their tokens, the scores, the optimizer with its learning rates, both evaluations and all
that is written down are those of Lossmith's own loop, so that the run is read, resumed and compared like any other.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from lossmith.adapters.trl.settings import check_needs
from lossmith.adapters.trl.trainer import GRPOConfig, LossmithGRPOTrainer, batch_fields, native_metrics
from lossmith.errors import RecipeError, RunError, ScorerError, nearest
from lossmith.losses import Batch, Credit, PolicyLoss
from lossmith.optimization import rate_factor
from lossmith.policy import Policy, adapter_base, distribution_of
from lossmith.rollouts import Distribution, FinishReason, LogProbs, Rollout
from lossmith.scorers import score_rollouts
from lossmith.training import Recipe, Run, Step, Update
from lossmith.training.clock import Clock
from lossmith.training.loop import look, record, those_scored, watch, with_advantages

__all__ = ["check_recipe", "learn"]


def check_recipe(recipe: Recipe) -> None:
    """RecipeError, before the model is loaded: each setting that TRL's trainer has nothing for. LossError: the loss."""
    loss = recipe.policy_loss()
    check_needs(loss)
    whole = not (loss.separable or isinstance(loss, PolicyLoss))
    completions, parts = recipe.prompts_per_step * recipe.samples_per_prompt, recipe.updates_per_step
    wrong: dict[str, str] = {}
    if recipe.top_p < 1 or recipe.top_k:
        name = "top_p" if recipe.top_p < 1 else "top_k"
        wrong[name] = "TRL's log-probabilities are of the whole distribution, and not of what was sampled from"
    if recipe.stop:
        wrong["stop"] = "its completions end at end tokens and max_tokens alone"
    if recipe.samples_per_prompt == 1:
        wrong["samples_per_prompt"] = "it samples 2 or more of each prompt"
    if completions % parts:
        wrong["updates_per_step"] = f"it cuts the {completions} completions of a step into equal parts"
    elif whole and parts > 1:
        wrong["updates_per_step"] = f"it parts the completions of a prompt, which {loss.name} compares"
    if recipe.lora_rank:
        wrong["lora_rank"] = "it is given the whole model to train"
    elif adapter_base(recipe.model) is not None:
        wrong["model"] = "it is a LoRA adapter, and TRL is given a whole model to train"
    of_ours = {
        "micro_batch_tokens": (recipe.micro_batch_tokens == "auto", "its passes are not measured: give a number"),
        "compile": (recipe.compile, "it computes with the model as it is"),
        "float32_head": (recipe.float32_head, "it has cast_lm_head_to_fp32 among its own settings (engine_options)"),
        "evaluate_every": (recipe.evaluate_every, "between two of its steps the model is as its trainer wraps it"),
    }
    wrong |= {name: why for name, (given, why) in of_ours.items() if given}
    if recipe.device not in ("auto", "cpu", "cuda", "mps"):
        wrong["device"] = "it takes the first one of the machine"
    _check_options(recipe)
    if wrong:
        said = "; ".join(f"{name} = {getattr(recipe, name)!r}: {why}" for name, why in wrong.items())
        raise RecipeError(
            f"engine = 'trl': TRL's GRPOTrainer cannot be told this. {said}. Change it, or take engine = 'lossmith'."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            "engine = 'trl' runs in one process, and this is one of several. For several, give the loss to "
            "lossmith.adapters.trl.LossmithGRPOTrainer in a script of your own."
        )


def learn(run: Run, show: Callable[[Step], None]) -> None:
    """The rounds of a run that was started, each recorded in its folder and then shown."""
    if not run.remaining_steps():
        return
    with _lent(run), tempfile.TemporaryDirectory() as scratch:
        rounds = _Rounds(run, show, scratch)
        run.learner.reference = None  # TRL has one of its own, which is watched in its place
        run.learner.weights.reference = [] if rounds.ref_model is None else list(rounds.ref_model.parameters())
        rounds.train()


@contextlib.contextmanager
def _lent(run: Run) -> Iterator[None]:
    """The model and the tokenizer as TRL takes them, and afterwards as they were, but for the weights."""
    model, tokenizer = run.policy.model, run.policy.tokenizer
    text = model.config.get_text_config()
    generation, pad = copy.deepcopy(model.generation_config), tokenizer.pad_token
    configured = {name: getattr(text, name, None) for name in ("pad_token_id", "use_cache")}
    model.generation_config.eos_token_id = sorted(run.policy.eos_ids)
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):  # TRL's and accelerate's, before the model's own
            model.__dict__.pop(name, None)
        model.generation_config, tokenizer.pad_token = generation, pad
        for name, value in configured.items():
            setattr(text, name, value)
        if run.learner.recompute:
            model.gradient_checkpointing_disable()
        model.eval()


def _config(run: Run, scratch: str) -> Any:
    """The recipe in TRL's words, and what it says in them itself."""
    recipe, learner = run.recipe, run.learner
    update = recipe.prompts_per_step * recipe.samples_per_prompt // recipe.updates_per_step
    room = max(1, recipe.pass_tokens // (learner.memory.longest + recipe.max_tokens))
    rows = max(n for n in range(1, update + 1) if update % n == 0 and n <= room) if learner.loss.separable else update
    cpu = run.policy.device.type == "cpu"
    ours = {
        "output_dir": scratch,
        "max_steps": len(run.remaining_steps()) * _updates(recipe),
        "num_generations": recipe.samples_per_prompt,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": update // rows,
        "steps_per_generation": update // rows * recipe.updates_per_step,
        "num_iterations": recipe.epochs,
        "max_completion_length": recipe.max_tokens,
        "temperature": recipe.temperature,
        "max_grad_norm": recipe.max_grad_norm,
        "seed": recipe.seed,
        "use_cpu": cpu,
        "bf16": run.policy.compute_dtype == torch.bfloat16,
        "gradient_checkpointing": learner.recompute,
        "disable_dropout": True,
        "shuffle_dataset": False,
        "dataloader_pin_memory": not cpu,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    try:
        return GRPOConfig(**{**ours, **recipe.engine_options})
    except (ValueError, TypeError, ImportError) as error:  # a value that TRL, or what it is built on, refuses
        raise RecipeError(f"engine_options: TRL refuses them: {error}") from None


# What the recipe, the run's folder or the loss says; a GRPOConfig that says it as well could only disagree.
_DECIDED = {
    "max_steps": "steps", "num_train_epochs": "steps", "num_generations": "samples_per_prompt",
    "per_device_train_batch_size": "micro_batch_tokens", "gradient_accumulation_steps": "micro_batch_tokens",
    "steps_per_generation": "updates_per_step", "generation_batch_size": "prompts_per_step",
    "num_iterations": "epochs", "max_completion_length": "max_tokens", "temperature": "temperature",
    "top_p": "top_p", "top_k": "top_k", "max_grad_norm": "max_grad_norm", "seed": "seed", "data_seed": "seed",
    "use_cpu": "device", "bf16": "dtype", "fp16": "dtype", "learning_rate": "learning_rate",
    "lr_scheduler_type": "schedule", "warmup_steps": "warmup_steps", "warmup_ratio": "warmup_steps",
    "weight_decay": "weight_decay", "output_dir": "runs", "report_to": "track", "save_strategy": "checkpoint_every",
    "save_steps": "checkpoint_every", "beta": "loss", "loss_type": "loss", "logging_steps": "steps",
    "eval_strategy": "held_out", "shuffle_dataset": "seed", "disable_tqdm": "name",
}  # fmt: skip


def _check_options(recipe: Recipe) -> None:
    """RecipeError: an option that GRPOConfig does not have, or that another setting decides."""
    known = [field.name for field in dataclasses.fields(GRPOConfig)]
    for name in recipe.engine_options:
        if name in _DECIDED:
            raise RecipeError(f"engine_options: {name} is decided by the recipe's {_DECIDED[name]}. Set that instead.")
        if name not in known:
            raise RecipeError(f"engine_options: TRL's GRPOConfig has no {name!r}.{nearest(name, known)}")


def _updates(recipe: Recipe) -> int:
    """Optimizer steps of a round."""
    return recipe.epochs * recipe.updates_per_step


class _Rounds(LossmithGRPOTrainer):
    """TRL's trainer on the prompts, the scorer, the optimizer and the folder of a run."""

    _keeps_old = True  # the sampler says no log-probabilities, and a step's file holds them

    def __init__(self, run: Run, show: Callable[[Step], None], scratch: str) -> None:
        from datasets import Dataset

        self.lossmith_run, self.show = run, show
        recipe, optimizer = run.recipe, run.learner.optimizer
        rounds = [run.prompts.batch(i, recipe.prompts_per_step, recipe.seed) for i in run.remaining_steps()]
        self.prompts = {prompt.id: prompt for prompts in rounds for prompt in prompts}
        self.clock, self.skipped = Clock(), 0
        self.logs: list[dict[str, float]] = []  # of the round's updates
        self.rollouts: list[Rollout] = []  # of the round
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda update: rate_factor(recipe, run.first_step + update // _updates(recipe), recipe.steps)
        )
        super().__init__(
            run.policy.model,
            self.score,
            _config(run, scratch),
            Dataset.from_dict({"prompt": [prompt.id for prompts in rounds for prompt in prompts]}),
            processing_class=run.policy.tokenizer,
            callbacks=[_Recorder(self)],
            optimizers=(optimizer, schedule),
            loss=run.learner.loss,
        )
        self.remove_callback(PrinterCallback)

    def _trl_beta(self) -> float:
        return super()._trl_beta() or float(self.lossmith_run.recipe.tracks_kl)

    @property
    def index(self) -> int:
        """The round that is under way."""
        return int(self.lossmith_run.first_step + self.state.global_step // _updates(self.lossmith_run.recipe))

    # -- sampling and scoring ---------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """A prompt comes by its id, so that its tokens are those of Lossmith's own sampler."""
        return [list(self.lossmith_run.policy.encode(self.prompts[key])) for key in prompts], None, {}

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        run = self.lossmith_run
        run.tell("sampling", 0, 0)
        run.learner.weights.begin()
        # what a round samples and how it is shuffled depend on the seed and its number, as when it is resumed
        torch.manual_seed(int(np.random.SeedSequence([run.recipe.seed, self.index]).generate_state(1)[0]))
        with self.clock("sample"):
            out: dict[str, Any] = super()._generate_and_score_completions(inputs)
        run.tell("updating", 0, 0)
        distribution = distribution_of(run.policy, run.recipe.sampling)
        rows = batch_fields(out)["behavior_logp"].cpu()
        self.rollouts = [
            dataclasses.replace(r, behavior_logp=LogProbs(rows[i, : len(r.completion_ids)].float(), distribution))
            for i, r in enumerate(self.rollouts)
        ]
        self.updating = time.perf_counter()
        return out

    def score(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        """The recipe's scorer as a reward function of TRL."""
        run, per_prompt = self.lossmith_run, self.lossmith_run.recipe.samples_per_prompt
        run.tell("scoring", 0, len(prompts))
        rows = zip(prompts, completion_ids, strict=True)
        written = [_rollout(run.policy, self.prompts[key], i % per_prompt, ids) for i, (key, ids) in enumerate(rows)]
        with self.clock("score"):
            self.rollouts = score_rollouts(
                run.scorer, written, on_error=run.recipe.scorer_errors, timeout=run.recipe.scorer_timeout
            )
        if any(r.score is not None and r.score.per_token is not None for r in self.rollouts):
            raise ScorerError(
                f"scorer {run.scorer.name!r} gives rewards by token, and TRL's GRPOTrainer has one a completion: take "
                "engine = 'lossmith'."
            )
        those_scored(self.rollouts, self.index)
        return [r.score.value if r.score else None for r in self.rollouts]

    def _credit(self, whole: Batch, counted: Tensor) -> Credit:
        credit = super()._credit(whole, counted)
        self.seen = whole, credit
        return credit

    # -- steps ------------------------------------------------------------------------------------------------------

    def before_update(self) -> None:
        """A gradient that is not finite moves nothing."""
        learner = self.lossmith_run.learner
        gradients = [p.grad for p in self.lossmith_run.policy.parameters() if p.grad is not None]
        finite = all(bool(x.isfinite().all()) for x in gradients)
        learner.bad_in_a_row = 0 if finite else learner.bad_in_a_row + 1
        if learner.bad_in_a_row == 3:
            raise RunError(
                f"step {self.index + 1}: the gradient was not finite three times in a row; lower learning_rate."
            )
        learner.settled = False
        if finite:
            self.lossmith_run.policy.version += 1
        else:
            learner.optimizer.zero_grad(set_to_none=True)
            self.skipped += 1

    def after_update(self, logs: dict[str, Any]) -> bool:
        """Whether the run goes on. logs: what TRL measured of the update."""
        run = self.lossmith_run
        self.logs.append(native_metrics(logs))
        if self.state.global_step % _updates(run.recipe):
            return True
        index, (whole, credit) = self.index - 1, self.seen
        rows = torch.tensor([r.scored for r in self.rollouts], device=whole.valid.device).nonzero()[:, 0]
        whole, credit = whole.rows(rows), credit.rows(rows)
        update = Update(self._measured(credit), self.skipped)
        seconds = self.clock.read()
        seconds["sample"] -= seconds["score"]  # TRL scores while it makes the batch
        seconds["update"] = time.perf_counter() - self.updating
        clock = Clock()
        watched = watch(run, self.rollouts, clock)
        step = Step(
            index, with_advantages(self.rollouts, credit), update, seconds | clock.read(), watched, whole, credit
        )
        self.logs, self.skipped = [], 0
        record(run, step)
        look(run, step)
        self.show(step)
        return not run.stopped

    def _measured(self, credit: Credit) -> dict[str, float]:
        """The metrics of the round's updates, by the names of Lossmith's own loop."""
        names = dict.fromkeys(name for log in self.logs for name in log)
        finite = {name: [x for log in self.logs if math.isfinite(x := log.get(name, math.nan))] for name in names}
        means = {name: sum(found) / len(found) for name, found in finite.items() if found}
        means |= self.lossmith_run.learner.weights.measured()
        means |= credit.metrics | {"learning_rate": self.logs[-1]["learning_rate"]}
        if isinstance(self.loss, PolicyLoss) and self.loss.kl.active:
            means["kl_coefficient"] = self.loss.kl.beta
        return means


def _rollout(policy: Policy, prompt: Any, sample: int, ids: Sequence[int]) -> Rollout:
    """What TRL sampled; its log-probabilities come later."""
    before = policy.encode(prompt)
    unknown = LogProbs(torch.full((len(ids),), math.nan), Distribution(policy.version))
    reason: FinishReason = "eos" if ids[-1] in policy.eos_ids else "length"
    return Rollout(prompt, sample, before, tuple(ids), policy.decode(ids, before), unknown, reason)


class _Recorder(TrainerCallback):
    """Tells the trainer when an update is about to be made, and when it was logged."""

    def __init__(self, rounds: _Rounds) -> None:
        self.rounds = rounds

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.rounds.before_update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs is not None and "loss" in logs and not self.rounds.after_update(logs):
            control.should_training_stop = True

"""A recipe: everything that decides a run, in one flat record. A first run needs none of it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import Field

from lossmith.detectors import DETECTORS
from lossmith.errors import RecipeError, nearest, quiet_traps
from lossmith.losses import Loss, PolicyLoss, parse_loss
from lossmith.losses.batch import FIELDS
from lossmith.optimization import check_optimizer
from lossmith.policy import ALL_LINEAR, LoraSettings, SamplingSettings, adapter_base
from lossmith.scorers import ScorerSettings
from lossmith.settings.base import TrainerSettings
from lossmith.training.can_learn import check_loss, check_sampling, check_taught

__all__ = ["PROVIDED", "Recipe", "RunSettings", "check_lora", "checked_loss"]

PASS_TOKENS = 1024  # in one pass, where nothing better is known
COMPLETIONS = 1_000_000  # of a step, which are held in memory together


class RunSettings(TrainerSettings):
    """What every run of a policy is told, whatever it learns from."""

    resumed_by: ClassVar[str] = ""  # the command that goes on with a run of such a recipe
    resumed_in_python: ClassVar[str] = ""  # the function that does
    extended_by: ClassVar[str] = ""  # what gives a finished run more steps, where anything can

    chat_template: str | None = Field(None, description="which of the model's chat templates, where it has several")
    float32_head: bool = Field(False, description="logits in float32 under dtype = bfloat16: a smaller sampler_gap")
    allow_traps: bool = Field(False, description="train with a loss that is known to mislead")
    lora_rank: int = Field(
        0, ge=0, description="train a LoRA adapter of this rank, and leave the model's own weights; 0 trains those"
    )
    lora_alpha: float = Field(32.0, gt=0, description="what the adapter adds is multiplied by lora_alpha / lora_rank")
    lora_targets: list[str] = Field(
        [ALL_LINEAR],
        description="linear layers that the adapter is for, by name (q_proj); all-linear: all but the head",
    )
    quantize: Literal["nf4"] | None = Field(
        None,
        description="nf4: the model's own weights beside an adapter in 4 bits, by bitsandbytes (QLoRA)",
    )
    memory_gb: float | None = Field(
        None, gt=0, description="memory that training may take: beyond it, layers are run again in the backward pass"
    )

    runs: str = Field("runs", description="folder in which the run gets a folder of its own")
    name: str | None = Field(None, description="name of the run's folder; made from the time and loss if not given")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints, besides those by time; 0 for none")
    track: Literal["tensorboard", "trackio", "wandb", "mlflow"] | None = Field(
        None, description="a tracker that is told every step's figures too, through its own client (pip install it)"
    )

    @property
    def lora(self) -> LoraSettings | None:
        """The new adapter that is trained, if any."""
        if not self.lora_rank:
            return None
        return LoraSettings(self.lora_rank, self.lora_alpha, tuple(self.lora_targets), self.seed)


class Recipe(RunSettings):
    """The settings of a training run. Every field has a default; `recipe.toml` in a run folder holds them all."""

    live: ClassVar[tuple[str, ...]] = ("prompts", "scorer", "watch")
    paths: ClassVar[tuple[str, ...]] = ("model", "teacher", "prompts", "scorer", "watch", "loss", "runs")
    resumed_by: ClassVar[str] = "lossmith train --resume"
    resumed_in_python: ClassVar[str] = "lossmith.resume"
    extended_by: ClassVar[str] = " --steps MORE"

    prompts: Any = Field("default", description="prompts: 'default', a file, a datasets folder, a hub name, or a list")
    prompt_column: str = Field("prompt", description="column that holds the prompt: text or chat messages")
    prompt_split: str = Field("train", description="split of a Hugging Face data set")
    prompt_limit: int | None = Field(None, gt=0, description="use only this many prompts")
    pass_columns: list[str] = Field([], description="target-like columns (answer, label, ...) to pass on to the scorer")
    held_out: int | float = Field(48, gt=0, description="prompts kept for the before/after comparison: number or share")

    evaluate_every: int = Field(
        0, ge=0, description="steps between looks at the held-out prompts during the run; 0: only before and after"
    )
    keep_best: bool = Field(
        False, description="keep the policy with the best held-out score of those looks too, in policy-best/"
    )

    scorer: Any = Field(
        "helpfulness",
        description="built-in name, file.py:function, module:function, http(s) address, reward-model folder, or a "
        "table {scorers=[...], weights=[...], standardize=false}",
    )
    scorer_errors: Literal["stop", "drop"] = Field(
        "stop", description="a scorer that fails on a completion stops the run, or that rollout is dropped and counted"
    )
    accept_weak_scorer: bool = Field(
        False, description="learn from a reward model even if it is not known to be better than chance"
    )
    scorer_timeout: float = Field(
        60.0, gt=0, description="seconds that one call of the scorer may take, tries again included"
    )
    scorer_parallel: int = Field(1, gt=0, description="calls of an http scorer at once")
    scorer_per_minute: int = Field(
        0, ge=0, description="calls of an http scorer in any minute, not counted in scorer_timeout; 0 for no limit"
    )
    scorer_batch: int = Field(
        0, ge=0, description="completions in one call of an http scorer; 0 for all that are asked about at once"
    )

    watch: Any = Field(
        None, description="a second scorer that nothing is trained on: shows when the first is over-optimized"
    )
    guards: dict[str, Literal["warn", "stop", "off"]] = Field(
        {},
        description="what a detector's finding does, by its name, or for all: warn, stop or off; the others warn, and "
        "stop a run that is lost (docs/doctor.md)",
    )
    watch_window: int = Field(
        0, ge=0, description="stop once the watched score, averaged over this many steps, has surely fallen; 0 never"
    )
    kl_budget: float | None = Field(
        None, gt=0, description="stop once the policy is this far from the untrained one: KL, nats a completion"
    )

    loss: Any = Field(
        "grpo",
        description="loss: a name, 'name@library', 'grpo(beta=0.04)', 'my.py:function', or a table of parameters",
    )

    teacher: str | None = Field(
        None,
        description="model that a loss of distillation learns from: a folder, a hub name, or 'self' for the policy as "
        "it is, told more than its prompt (teacher_column)",
    )
    teacher_column: str | None = Field(
        None, description="column of the prompts with what the teacher alone is told: feedback, hints, a demonstration"
    )

    engine: Literal["lossmith", "trl"] = Field(
        "lossmith", description="what trains: lossmith itself, or TRL's GRPOTrainer (pip install lossmith[trl])"
    )
    engine_options: dict[str, Any] = Field(
        {}, description="settings of TRL's GRPOConfig that no other setting decides, such as use_vllm or deepspeed"
    )

    sampler: Literal["torch", "vllm"] = Field(
        "torch", description="what writes completions: the model that learns, or a vLLM server (docs/vllm.md)"
    )
    sampler_url: str | None = Field(
        None, description="http address of a vLLM server that runs; without one, Lossmith starts and ends its own"
    )
    max_staleness: int = Field(
        0, ge=0, description="rounds that samplers of a cluster may be ahead of the learner (docs/cluster.md); 0: none"
    )
    sampler_timeout: float = Field(
        600.0, gt=0, description="seconds that a vLLM server has for one answer, or to start"
    )

    steps: int = Field(12, gt=0, description="rounds of sample, score, update")
    prompts_per_step: int = Field(8, gt=0, description="prompts in a round")
    samples_per_prompt: int = Field(8, gt=0, description="completions of each prompt")
    max_tokens: int = Field(48, gt=0, description="token budget of a completion")
    temperature: float = Field(0.7, ge=0, description="sampling temperature; the policy is trained at it too")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus: smallest set of tokens with this probability; 1 is off")
    top_k: int = Field(0, ge=0, description="only the k likeliest tokens; 0 is off")
    stop: list[str] = Field([], description="strings that end a completion, special tokens among them")
    special_tokens: Literal["answer", "all", "none"] = Field(
        "answer",
        description="special tokens that a completion's text shows to scorers and people: those that are part of the "
        "answer (<think>, tool calls), all (the end token too), or none",
    )

    updates_per_step: int = Field(1, gt=0, description="parts into which a round is cut, one optimizer step for each")
    epochs: int = Field(1, gt=0, description="passes over a round's completions")
    value_learning_rate: float = Field(
        1e-3, ge=0, description="learning rate of the value head, where the loss has one"
    )
    micro_batch_tokens: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(  # type: ignore[assignment]
        PASS_TOKENS,
        description="tokens in one forward and backward pass; changes no result. auto: measured before the first step",
    )
    compile: bool | Literal["auto"] = Field(
        False,
        description="update through torch.compile: the first steps take longer, later ones less time and memory. auto: "
        "tried before the first step, in a run that is long enough",
    )
    weights: Literal["float32", "bfloat16"] = Field(
        "float32", description="what weights, gradients and optimizer are held in; bfloat16 for big models: half of it"
    )
    shard: bool = Field(
        False, description="several ranks: each holds a part of weights, gradients and optimizer state, not all of them"
    )
    seed: int = Field(0, ge=0, description="decides prompts, samples and split")
    save_rollouts: bool = Field(True, description="write every completion to rollouts/ as parquet")

    @pydantic.field_validator("guards", "engine_options", mode="before")
    @classmethod
    def _spelled_as_options(cls, value: Any) -> Any:
        """--guards.sampler-gap names sampler_gap."""
        return {str(k).replace("-", "_"): v for k, v in value.items()} if isinstance(value, Mapping) else value

    @classmethod
    def make(cls, source: str = "recipe", /, **fields: Any) -> Self:
        """A checked recipe. RecipeError: an unknown key (and the nearest), a wrong type or range, a bad combination."""
        recipe = cls.checked(source, fields)
        _check_guards(source, recipe.guards)
        check_sampling(source, recipe.sampling, recipe.samples_per_prompt)
        check_optimizer(source, recipe)
        check_lora(source, recipe)
        if recipe.shard and recipe.engine == "trl":
            raise RecipeError(f"{source}: shard = true is of engine = 'lossmith': TRL's trainer shards by accelerate.")
        if recipe.shard and recipe.quantize is not None:
            raise RecipeError(
                f"{source}: shard = true and quantize = {recipe.quantize!r}: beside an adapter, what is trained is "
                "small, and every rank holds all of it. Leave shard out."
            )
        if recipe.engine_options and recipe.engine == "lossmith":
            raise RecipeError(
                f"{source}: engine_options are of another engine: give engine = 'trl' too, or leave them out."
            )
        _check_sampler(source, recipe)
        _check_weights(source, recipe)
        if recipe.prompts_per_step * recipe.samples_per_prompt > COMPLETIONS:
            raise RecipeError(
                f"{source}: prompts_per_step = {recipe.prompts_per_step} times samples_per_prompt = "
                f"{recipe.samples_per_prompt} is more than the {COMPLETIONS} completions that a step can hold."
            )
        if recipe.warmup_steps > recipe.steps:
            raise RecipeError(f"{source}: warmup_steps = {recipe.warmup_steps} exceeds steps = {recipe.steps}.")
        if recipe.watch_window and recipe.watch is None:
            raise RecipeError(f"{source}: watch_window = {recipe.watch_window} has nothing to average: give watch too.")
        if recipe.keep_best and not recipe.evaluate_every:
            raise RecipeError(
                f"{source}: keep_best = true has one policy to choose from: say how often the held-out prompts are "
                "looked at, with evaluate_every."
            )
        if recipe.teacher_column is not None and recipe.teacher is None:
            raise RecipeError(
                f"{source}: teacher_column = {recipe.teacher_column!r} is what a teacher is told, and there is none: "
                "give teacher, a folder or 'self'."
            )
        if recipe.teacher == "self" and recipe.teacher_column is None:
            raise RecipeError(
                f"{source}: teacher = 'self' that is told nothing agrees with the policy, and there is nothing to "
                "learn: name a column with feedback or demonstrations in teacher_column."
            )
        if recipe.teacher is not None and recipe.engine == "trl":
            raise RecipeError(
                f"{source}: engine = 'trl' has no teacher beside the policy. Leave engine at 'lossmith', or train with "
                "TRL's own DistillationTrainer."
            )
        if recipe.updates_per_step > recipe.prompts_per_step:
            raise RecipeError(
                f"{source}: updates_per_step = {recipe.updates_per_step} exceeds prompts_per_step = "
                f"{recipe.prompts_per_step}; a prompt's completions stay in one optimizer step."
            )
        return recipe

    @property
    def pass_tokens(self) -> int:
        """Tokens in one pass; where they are to be measured, those that are begun with."""
        return PASS_TOKENS if self.micro_batch_tokens == "auto" else self.micro_batch_tokens

    @property
    def tracks_kl(self) -> bool:
        """Whether the distance to the reference is measured even where the loss has no use for it."""
        return self.watch is not None or self.kl_budget is not None

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            stop=tuple(self.stop),
        )

    def scorer_settings(self, train_prompts: int) -> ScorerSettings:
        """What its scorers are told of the run."""
        a_step = self.epochs * min(self.updates_per_step, self.prompts_per_step)
        return ScorerSettings(
            parallel=self.scorer_parallel,
            per_minute=self.scorer_per_minute,
            batch=self.scorer_batch,
            updates=self.steps * a_step,
            passes=self.steps * self.prompts_per_step / train_prompts,
        )

    def policy_loss(self) -> Loss:
        """The loss that the recipe names, its token limit filled in.

        RecipeError: a trap, and traps are not allowed; something it needs that training does not provide; completions
        that it would compare and that there are none of.
        """
        loss = checked_loss(self.loss, self.allow_traps, PROVIDED, self.max_tokens)
        if self.sampler == "vllm" or self.max_staleness:
            loss = corrected(loss, self.loss)
        check_loss(loss, self.samples_per_prompt, self.prompts_per_step)
        check_taught(loss, self.teacher, self.sampling)
        return loss


def check_lora(source: str, recipe: RunSettings) -> None:
    """RecipeError: settings of an adapter, and none is to be trained; an adapter for no layer."""
    fields = type(recipe).model_fields
    if recipe.quantize is not None and not recipe.lora_rank and adapter_base(recipe.model) is None:
        raise RecipeError(
            f"{source}: quantize = {recipe.quantize!r}: weights in 4 bits cannot learn, but an adapter beside them: "
            "give lora_rank too (16, say)."
        )
    for name in ("lora_alpha", "lora_targets"):
        value = getattr(recipe, name)
        if not recipe.lora_rank and value != fields[name].get_default():
            raise RecipeError(f"{source}: {name} = {value!r} is for a new adapter: give lora_rank too (16, say).")
    if not recipe.lora_targets or not all(recipe.lora_targets):
        raise RecipeError(
            f"{source}: lora_targets = {recipe.lora_targets!r} names no layer: [{ALL_LINEAR!r}] names all."
        )
    if ALL_LINEAR in recipe.lora_targets and len(recipe.lora_targets) > 1:
        raise RecipeError(f"{source}: lora_targets = {recipe.lora_targets!r}: {ALL_LINEAR} stands alone.")


def corrected(loss: Loss, spec: Any) -> Loss:
    """With truncated importance sampling where another engine or an older policy samples: its numbers are never quite
    the learner's.

    Left alone is a loss that has a correction, holds the ratio to the sampler itself, is told which it is to have
    (mismatch='none' too), or takes none.
    """
    told = isinstance(spec, PolicyLoss) or "mismatch" in str(spec)
    if told or not isinstance(loss, PolicyLoss) or loss.mismatch.acts or "behavior_logp" in loss.needs:
        return loss
    with quiet_traps():
        return loss.replace(mismatch="tis")


def _check_sampler(source: str, recipe: Recipe) -> None:
    if recipe.sampler == "torch" and recipe.sampler_url is not None:
        raise RecipeError(f"{source}: sampler_url is of a vLLM server: give sampler = 'vllm' too, or leave it out.")
    if recipe.sampler_url is not None and not recipe.sampler_url.startswith(("http://", "https://")):
        raise RecipeError(f"{source}: sampler_url = {recipe.sampler_url!r} must begin with http:// or https://.")
    if recipe.sampler == "vllm" and (recipe.lora_rank or adapter_base(recipe.model) is not None):
        raise RecipeError(
            f"{source}: sampler = 'vllm' is sent whole models, and here a LoRA adapter is trained: leave sampler = "
            "'torch', or train the model's own weights."
        )
    if recipe.sampler == "vllm" and recipe.engine == "trl":
        raise RecipeError(
            f"{source}: sampler = 'vllm' is of Lossmith's own engine. With engine = 'trl', TRL samples: give "
            "engine_options = {use_vllm = true} instead."
        )


def _check_weights(source: str, recipe: Recipe) -> None:
    """RecipeError: something that weights held in bfloat16 do not go with."""
    if recipe.weights == "float32":
        return
    named = f"{source}: weights = 'bfloat16'"
    if recipe.dtype == "float32":
        raise RecipeError(f"{named} and dtype = 'float32': they are multiplied in bfloat16. Leave dtype at 'auto'.")
    if recipe.lora_rank or adapter_base(recipe.model) is not None:
        raise RecipeError(
            f"{named} is for weights that are trained, and here a LoRA adapter is: what stands beside it is held in "
            "dtype already. Leave weights at 'float32'."
        )
    if recipe.shard:
        raise RecipeError(
            f"{named} and shard = true: FSDP2 holds a layer in one type, and norms stay in float32. Choose one of them."
        )
    if recipe.engine == "trl":
        raise RecipeError(f"{named} is of engine = 'lossmith': TRL's trainer has an optimizer of its own.")
    if recipe.weight_decay:
        raise RecipeError(
            f"{named} and weight_decay = {recipe.weight_decay:g}: what that takes of a weight in one update is rounded "
            "away. Leave weight_decay at 0."
        )


def checked_loss(spec: Any, allow_traps: bool, provided: Set[str], max_tokens: int | None = None) -> Loss:
    """The loss of a recipe, its token limit filled in, of which training provides these fields.

    RecipeError: a trap, and traps are not allowed; something it needs that training does not provide.
    """
    with quiet_traps():  # said below, as an error or not at all
        loss = parse_loss(spec)
        if max_tokens is not None and "max_length" in loss.needs:
            loss = loss.replace(max_length=max_tokens)
    if loss.traps and not allow_traps:
        raise RecipeError(
            f"The loss {loss.name!r} is a known trap: {'; '.join(loss.traps)}. Set allow_traps = true to train with it."
        )
    _check_needs(loss, provided)
    return loss


def _check_guards(source: str, guards: Mapping[str, str]) -> None:
    for name in guards:
        if name != "all" and name not in DETECTORS:
            raise RecipeError(f"{source}: guards: there is no detector {name!r}.{nearest(name, [*DETECTORS, 'all'])}")


# What the loop can fill in for a loss.
PROVIDED = {name for name, field in FIELDS.items() if field.trained}


def _check_needs(loss: Loss, provided: Set[str]) -> None:
    for name in sorted(loss.needs - provided):
        if name in FIELDS:
            raise RecipeError(
                f"The loss {loss.name!r} needs Batch.{name}, which training does not provide. "
                "Use it in a loop of your own, or choose a loss that does without (`lossmith losses list`)."
            )
        raise RecipeError(f"The loss {loss.name!r} needs the parameter {name}: write {loss.name}({name}=...).")

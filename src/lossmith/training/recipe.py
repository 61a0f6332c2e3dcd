"""A recipe: everything that decides a run, in one flat record. A first run needs none of it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from lossmith.errors import RecipeError, quiet_traps
from lossmith.files import at_home, read_text, text_at_home
from lossmith.losses import Loss, parse_loss
from lossmith.losses.batch import FIELDS
from lossmith.policy import SamplingSettings
from lossmith.scorers import ScorerSettings
from lossmith.scorers.address import redacted
from lossmith.training.can_learn import check_loss, check_optimizer, check_sampling
from lossmith.training.elsewhere import instead_of
from lossmith.training.paths import absolute
from lossmith.training.wanted import wanted

__all__ = ["PROVIDED", "Recipe", "Settings", "checked_loss"]

HUGE = 1_000_000_000  # no count of a run reaches it
COMPLETIONS = 1_000_000  # of a step, which are held in memory together


class Settings(BaseModel):
    """A flat record that a TOML file holds."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True, allow_inf_nan=False)
    live: ClassVar[tuple[str, ...]] = ()  # fields that may hold a Python object
    paths: ClassVar[tuple[str, ...]] = ()  # fields that may name a file or a folder
    resumed_by: ClassVar[str] = ""  # the command that goes on with a run of such a recipe
    resumed_in_python: ClassVar[str] = ""  # the function that does
    extended_by: ClassVar[str] = ""  # what gives a finished run more steps, where anything can
    # where and how often a run writes and asks, which decides nothing of what it learns
    free: ClassVar[tuple[str, ...]] = (
        "runs", "name", "checkpoint_every", "checkpoint_minutes", "save_rollouts",
        "accept_weak_scorer", "scorer_timeout", "scorer_parallel", "scorer_per_minute",
    )  # fmt: skip

    @classmethod
    def read(cls, path: Path | str) -> dict[str, Any]:
        """The fields that a TOML file sets, its paths relative to its folder.

        RecipeError names the file, and the line of a syntax error.
        """
        text = read_text(path, RecipeError, "recipe file")
        try:
            fields = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also a number or date that Python cannot hold
            raise RecipeError(f"{path} is not a TOML file: {error}.") from None
        return cls.resolved(fields, at_home(path).parent)

    @classmethod
    def resolved(cls, fields: Mapping[str, Any], base: Path) -> dict[str, Any]:
        """The fields with every path absolute: `~` is home, and what is relative is meant from `base`."""
        return dict(fields) | {key: absolute(key, fields[key], base) for key in cls.paths if key in fields}

    @classmethod
    def make(cls, source: str = "recipe", /, **fields: Any) -> Self:
        """A checked record."""
        return cls.checked(source, fields)

    @classmethod
    def checked(cls, source: str, fields: Mapping[str, Any]) -> Self:
        """RecipeError: an unknown key (and the nearest), a wrong type or range. `~` in a path is the home folder."""
        for key in fields:
            if key not in cls.model_fields:
                raise RecipeError(
                    f"{source}: there is no setting {key!r}.{instead_of(key, fields[key], cls.model_fields)}"
                )
        fields = {key: _at_home(key, value) if key in cls.paths else value for key, value in fields.items()}
        try:
            return cls(**fields)
        except pydantic.ValidationError as error:
            raise RecipeError(f"{source}: {cls.refusal(error, repr)}") from None

    @classmethod
    def refusal(cls, error: pydantic.ValidationError, shown: Callable[[str], str]) -> str:
        """Which value was refused and what is wanted instead, in our words; `shown` writes a text value."""
        first = error.errors()[0]
        key = str(first["loc"][0])
        given = next((e["input"] for e in error.errors() if e["loc"] == (key,)), first["input"])
        value = shown(given) if isinstance(given, str) else repr(given).lower()  # true, as TOML has it
        field = cls.model_fields[key]
        at = "".join(f"[{i}]" for i in first["loc"][1:] if isinstance(i, int))  # of a list
        if first["type"] == "value_error" and not isinstance(given, bool):
            return f"{key} = {value} is too large: a whole number below {HUGE} is wanted ({field.description})."
        return f"{key}{at} = {value}: {wanted(field, given)} is wanted ({field.description})."

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_number_by_accident(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """true is no number, though Python takes it for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in (bool, Any):
            raise ValueError("a number")
        return value

    @pydantic.field_validator("*", mode="after")
    @classmethod
    def _no_number_without_end(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """A slip of the finger; a seed may be any number."""
        if isinstance(value, int) and value >= HUGE and info.field_name != "seed":
            raise ValueError("too large")
        return value

    def as_toml(self) -> dict[str, Any]:
        """Every field in TOML types, defaults included; None is left out. Live Python objects become their names.

        A key in a scorer's address becomes the name of the variable that a resumed run reads it from.
        """
        plain = {key: getattr(self, key) for key in type(self).model_fields}
        if isinstance(plain.get("loss"), Loss):
            plain["loss"] = {k: "none" if v is None else v for k, v in plain["loss"].to_dict().items()}
        secrets: list[str] = []
        for key in self.live:
            plain[key] = redacted(_plain(plain[key]), secrets)
        return {key: value for key, value in plain.items() if value is not None}

    def written(self) -> dict[str, Any]:
        """As recipe.toml holds it: whoever reads it may stand in another folder."""
        return self.resolved(self.as_toml(), Path.cwd())


class Recipe(Settings):
    """The settings of a training run. Every field has a default; `recipe.toml` in a run folder holds them all."""

    live: ClassVar[tuple[str, ...]] = ("prompts", "scorer", "watch")
    paths: ClassVar[tuple[str, ...]] = ("model", "prompts", "scorer", "watch", "loss", "runs")
    resumed_by: ClassVar[str] = "lossmith train --resume"
    resumed_in_python: ClassVar[str] = "lossmith.resume"
    extended_by: ClassVar[str] = " --steps MORE"

    model: str = Field("default", description="policy: 'default' (SmolLM2-135M-Instruct), a folder, or a hub name")
    device: str = Field("auto", description="auto, cpu, cuda, mps, ...")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute type; auto: bfloat16 where the machine is faster with it. Weights stay float32"
    )

    chat_template: str | None = Field(None, description="which of the model's chat templates, where it has several")

    prompts: Any = Field("default", description="prompts: 'default', a file, a datasets folder, a hub name, or a list")
    prompt_column: str = Field("prompt", description="column that holds the prompt: text or chat messages")
    prompt_split: str = Field("train", description="split of a Hugging Face data set")
    prompt_limit: int | None = Field(None, gt=0, description="use only this many prompts")
    pass_columns: list[str] = Field([], description="target-like columns (answer, label, ...) to pass on to the scorer")
    held_out: int | float = Field(48, gt=0, description="prompts kept for the before/after comparison: number or share")

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
        None, description="a second scorer that nothing is trained on: shows when the first is over-optimised"
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
    allow_traps: bool = Field(False, description="train with a loss that is known to mislead")

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

    updates_per_step: int = Field(1, gt=0, description="parts into which a round is cut, one optimiser step for each")
    epochs: int = Field(1, gt=0, description="passes over a round's completions")
    learning_rate: float = Field(4e-5, ge=0, description="AdamW's learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="learning rate over the steps")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    value_learning_rate: float = Field(
        1e-3, ge=0, description="learning rate of the value head, where the loss has one"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients longer than this are scaled down to it")
    micro_batch_tokens: int = Field(
        1024, gt=0, description="tokens in one forward and backward pass; changes no result"
    )
    compile: bool = Field(
        False, description="update through torch.compile: the first steps take longer, later ones less time and memory"
    )
    memory_gb: float | None = Field(
        None, gt=0, description="memory that training may take: beyond it, layers are run again in the backward pass"
    )

    seed: int = Field(0, ge=0, description="decides prompts, samples and split")
    runs: str = Field("runs", description="folder in which the run gets a folder of its own")
    name: str | None = Field(None, description="name of the run's folder; made from the time and loss if not given")
    checkpoint_minutes: float = Field(
        1.0, ge=0, description="minutes between checkpoints, more where saving takes over 3% of the time; 0 for none"
    )
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints, besides those by time; 0 for none")
    save_rollouts: bool = Field(True, description="write every completion to rollouts/ as parquet")

    @classmethod
    def make(cls, source: str = "recipe", /, **fields: Any) -> Self:
        """A checked recipe. RecipeError: an unknown key (and the nearest), a wrong type or range, a bad combination."""
        recipe = cls.checked(source, fields)
        check_sampling(source, recipe.sampling, recipe.samples_per_prompt)
        check_optimizer(source, recipe)
        if recipe.prompts_per_step * recipe.samples_per_prompt > COMPLETIONS:
            raise RecipeError(
                f"{source}: prompts_per_step = {recipe.prompts_per_step} times samples_per_prompt = "
                f"{recipe.samples_per_prompt} is more than the {COMPLETIONS} completions that a step can hold."
            )
        if recipe.warmup_steps > recipe.steps:
            raise RecipeError(f"{source}: warmup_steps = {recipe.warmup_steps} exceeds steps = {recipe.steps}.")
        if recipe.watch_window and recipe.watch is None:
            raise RecipeError(f"{source}: watch_window = {recipe.watch_window} has nothing to average: give watch too.")
        if recipe.updates_per_step > recipe.prompts_per_step:
            raise RecipeError(
                f"{source}: updates_per_step = {recipe.updates_per_step} exceeds prompts_per_step = "
                f"{recipe.prompts_per_step}; a prompt's completions are not torn apart."
            )
        return recipe

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
        check_loss(loss, self.samples_per_prompt, self.prompts_per_step)
        return loss


def checked_loss(spec: Any, allow_traps: bool, provided: Set[str], max_tokens: int | None = None) -> Loss:
    """The loss of a recipe, its token limit filled in, of which training provides these fields.

    RecipeError: a trap, and traps are not allowed; something it needs that training does not provide.
    """
    with quiet_traps():  # said below, as an error or not at all
        loss = parse_loss(spec)
        if max_tokens is not None and "max_length" in loss.needs:
            loss = loss.set({"max_length": max_tokens})
    if loss.traps and not allow_traps:
        raise RecipeError(
            f"The loss {loss.name!r} is a known trap: {'; '.join(loss.traps)}. Set allow_traps = true to train with it."
        )
    _check_needs(loss, provided)
    return loss


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


def _at_home(field: str, value: Any) -> Any:
    """A path with its `~` resolved, in a table of scorers or a loss's too; prompts in memory are texts, no paths."""
    if field in ("scorer", "watch", "loss") and isinstance(value, Mapping):
        return {key: _at_home(field, one) for key, one in value.items()}
    if field in ("scorer", "watch") and isinstance(value, list):
        return [_at_home(field, one) for one in value]
    return text_at_home(value, RecipeError) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"python: {len(value)} prompts in memory" if len(value) > 8 else [_plain(v) for v in value]
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"python: {getattr(value, '__module__', '')}.{name}"

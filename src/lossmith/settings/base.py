"""A record of settings that a TOML file holds, and the settings that every trainer of a model has."""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from lossmith.errors import RecipeError
from lossmith.files import at_home, read_text, text_at_home
from lossmith.losses import Loss
from lossmith.scorers.address import redacted
from lossmith.settings.paths import absolute
from lossmith.settings.unknown import instead_of
from lossmith.settings.wanted import members, wanted

__all__ = ["LearningRate", "MicroBatchTokens", "Schedule", "Settings", "TrainerSettings", "is_live"]

HUGE = 1_000_000_000  # no count of a run reaches it
_LIVE = "python: "  # what stands in a file in the place of a Python object begins so


class Settings(BaseModel):
    """A flat record that a TOML file holds."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True, allow_inf_nan=False)
    live: ClassVar[tuple[str, ...]] = ()  # fields that may hold a Python object
    paths: ClassVar[tuple[str, ...]] = ()  # fields that may name a file or a folder
    # where and how often a run writes and asks, which decides nothing of what it learns
    free: ClassVar[tuple[str, ...]] = (
        "runs", "name", "checkpoint_every", "checkpoint_minutes", "save_rollouts", "evaluate_every", "keep_best",
        "track", "accept_weak_scorer", "guards", "scorer_timeout", "scorer_parallel", "scorer_per_minute",
        "sampler_url", "sampler_timeout", "shard",
    )  # fmt: skip

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Help and recipe.toml begin with what a recipe alone has, and end with what it shares with others."""
        shared = {key for base in cls.__bases__ for key in getattr(base, "__pydantic_fields__", {})}
        cls.__pydantic_fields__ = dict(sorted(cls.__pydantic_fields__.items(), key=lambda item: item[0] in shared))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What each setting is where nobody says."""
        return cls.model_construct().as_toml()

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
        named = typing.get_origin(field.annotation) is dict  # a key of a table says where; a member of a union does not
        at = "".join(f"[{i}]" for i in first["loc"][1:] if isinstance(i, int) or named)
        if first["type"] == "value_error" and not isinstance(given, bool):
            return f"{key} = {value} is too large: a whole number below {HUGE} is wanted ({field.description})."
        return f"{key}{at} = {value}: {wanted(field, given)} is wanted ({field.description})."

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_number_by_accident(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """true is no number, though Python takes it for 1."""
        if (
            isinstance(value, bool)
            and cls.model_fields[str(info.field_name)].annotation is not Any
            and (bool not in members(cls.model_fields[str(info.field_name)].annotation))
        ):
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

    def in_memory(self) -> list[str]:
        """Fields that hold Python objects, which no file can."""
        return [key for key, value in self.as_toml().items() if is_live(value)]

    def written(self) -> dict[str, Any]:
        """As recipe.toml holds it: whoever reads it may work in another folder."""
        return self.resolved(self.as_toml(), Path.cwd())


# Annotated, so that a trainer may have another default without saying again what the field is.
LearningRate = Annotated[float, Field(ge=0, description="AdamW's learning rate")]
Schedule = Annotated[Literal["constant", "linear", "cosine"], Field(description="learning rate over the steps")]
MicroBatchTokens = Annotated[int, Field(gt=0, description="tokens in one forward and backward pass; changes no result")]


class TrainerSettings(Settings):
    """What every trainer is told of its model, its optimizer, and how often it saves."""

    model: str = Field("default", description="policy: 'default' (SmolLM2-135M-Instruct), a folder, or a hub name")
    device: str = Field("auto", description="auto, cpu, cuda, mps, ...")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type of products, not of weights; auto: bfloat16 where the machine is faster with it"
    )

    learning_rate: LearningRate = 4e-5
    schedule: Schedule = "constant"
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients longer than this are scaled down to it")
    micro_batch_tokens: MicroBatchTokens = 1024

    seed: int = Field(0, ge=0, description="decides order and split")
    checkpoint_minutes: float = Field(
        1.0, ge=0, description="minutes between checkpoints, more where saving takes over 3% of the time; 0 for none"
    )


def _at_home(field: str, value: Any) -> Any:
    """A path with its `~` resolved, in a table of scorers or a loss's too; prompts in memory are texts, no paths."""
    if field in ("scorer", "watch", "loss") and isinstance(value, Mapping):
        return {key: _at_home(field, one) for key, one in value.items()}
    if field in ("scorer", "watch") and isinstance(value, list):
        return [_at_home(field, one) for one in value]
    return text_at_home(value, RecipeError) if isinstance(value, str) else value


def is_live(value: Any) -> bool:
    """Whether a recipe's file names a Python object here, which it could not hold."""
    return str(value).startswith(_LIVE)


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
        return f"{_LIVE}{len(value)} prompts in memory" if len(value) > 8 else [_plain(v) for v in value]
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{_LIVE}{getattr(value, '__module__', '')}.{name}"

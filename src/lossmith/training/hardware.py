"""What a recipe takes on GPUs that are not here: memory by part, what crosses between them, and seconds a step.

Of the model its configuration alone is read: it is built without weights, so every count is that of the real one.
Memory is `estimate_memory`, whose constants were measured; seconds follow from the rates that the caller names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from lossmith.errors import PolicyError, RecipeError
from lossmith.files import at_home
from lossmith.policy import Policy, embedded_model
from lossmith.policy.adapter import add_adapter
from lossmith.policy.folder import adapter_base, check_config, in_brief
from lossmith.policy.trial import attends_fully
from lossmith.training.memory import MemoryEstimate, estimate_memory
from lossmith.training.recipe import Recipe
from lossmith.training.roofline import work_of

__all__ = ["Gpus", "HardwarePlan", "Split", "plan_hardware"]

REACHED = 0.4  # of a product's rate, by forward and backward passes: docs/speed.md measured 34% and 44%
READ = 0.5  # of the memory's rate, by a token's pass over all weights
_MOST_GPUS = 4096


@dataclass(frozen=True)
class Gpus:
    """What is there: memory of each in GB, and rates a second. Bytes cross between any two of them at `link`."""

    count: int
    memory_gb: float
    tflops: float = 800.0  # bfloat16 products without sparsity
    bandwidth_gb: float = 3000.0
    link_gb: float = 50.0


@dataclass(frozen=True)
class Split:
    """One way to lay a run over its GPUs. Bytes are those of one GPU.

    sharded: weights, gradients, optimizer and reference are parted over all (FSDP2), and a layer's are gathered where
    it runs; while completions are written each GPU holds the weights whole, in the compute type. Else each has all.
    """

    ranks: int
    sharded: bool
    recompute: bool
    parts: dict[str, float]  # held all the time
    sampling: float
    update: float

    @property
    def total(self) -> float:
        return sum(self.parts.values()) + max(self.sampling, self.update)

    @property
    def name(self) -> str:
        how = (
            "one GPU" if self.ranks == 1 else f"{self.ranks} GPUs, {'sharded' if self.sharded else 'a whole copy each'}"
        )
        return how + (", layers run again" if self.recompute else "")


@dataclass(frozen=True)
class HardwarePlan:
    """splits: all that were looked at; chosen: the one that takes the least time of those that fit, None where none
    does. instead: what would fit then, in words with bytes."""

    recipe: Recipe
    gpus: Gpus
    weights: int
    trained: int
    prompt_tokens: int
    splits: list[Split]
    chosen: Split | None
    seconds: dict[str, float] = field(default_factory=dict)  # of a step, by phase
    crossing: float = 0.0  # bytes that each GPU sends in a step
    idle: int = 0  # GPUs without a prompt
    instead: list[tuple[str, float]] = field(default_factory=list)


def plan_hardware(recipe: Recipe, gpus: Gpus, *, prompt_tokens: int = 256) -> HardwarePlan:
    """Memory, split, communication and time of a recipe, whose `model` may be a config.json too.

    prompt_tokens: of the longest prompt. RecipeError: numbers that are no machine; PolicyError: the model.
    """
    if gpus.count < 1 or not all(x > 0 for x in dataclasses.astuple(gpus)) or prompt_tokens < 1:
        raise RecipeError("gpus, gpu_memory, prompt_tokens and the rates are numbers above 0.")
    policy = _without_weights(recipe)
    splits = list(_splits(policy, recipe, gpus.count, prompt_tokens))
    fits = [split for split in splits if split.total <= gpus.memory_gb * 1e9]
    trained = sum(p.numel() for p in policy.parameters())
    weights = sum(p.numel() for p in policy.model.parameters())
    found = HardwarePlan(recipe, gpus, weights, trained, prompt_tokens, splits, None)
    if not fits:
        return dataclasses.replace(found, instead=list(_instead(recipe, gpus, prompt_tokens)))
    timed = [(split, *_time(policy, recipe, gpus, split, prompt_tokens)) for split in fits]
    chosen, seconds, crossing = min(timed, key=lambda row: sum(row[1].values()))
    idle = max(0, gpus.count - recipe.prompts_per_step)
    return dataclasses.replace(found, chosen=chosen, seconds=seconds, crossing=crossing, idle=idle)


def _without_weights(recipe: Recipe) -> Policy:
    """The model that a configuration describes, on no device."""
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    name = str(recipe.model)
    place = at_home(name, PolicyError)
    base = adapter_base(name) if place.is_dir() else None
    if base is not None:
        raise PolicyError(f"{name!r} is a LoRA adapter: plan for its base model {base!r}, with lora_rank.")
    if name != "default" and not place.exists() and (name.endswith(".json") or name.startswith((".", "/", "~"))):
        raise PolicyError(f"there is no model folder or config.json {name!r}.")
    source = (
        embedded_model()
        if name == "default"
        else place.parent
        if place.is_file()
        else place
        if place.is_dir()
        else name
    )
    try:
        config, _ = PretrainedConfig.get_config_dict(place if place.is_file() else source)
        check_config(config, name, PolicyError, "policy")
        known = AutoConfig.for_model(**config) if place.is_file() else AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(known, trust_remote_code=False)
    except PolicyError:
        raise
    except (
        Exception
    ) as problem:  # transformers alone runs here; of a damaged file or without a network it raises anything
        raise PolicyError(f"cannot read the configuration of {name!r}: {in_brief(problem)}") from None
    dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
    policy = Policy(network.eval(), None, dtype)
    policy.shares = attends_fully(policy)
    if recipe.lora is not None:
        policy.adapter = add_adapter(network, recipe.lora, name)
        if dtype != torch.float32:
            policy.adapter.narrow_base(dtype)
    return policy


def _splits(policy: Policy, recipe: Recipe, count: int, prompt_tokens: int) -> Iterator[Split]:
    loss = recipe.policy_loss()
    reference = bool(loss.needs & {"ref_logp", "full_kl"}) or recipe.tracks_kl
    own = recipe.model_copy(update={"prompts_per_step": -(-recipe.prompts_per_step // count)})
    memory = estimate_memory(policy, own, reference, prompt_tokens)
    for sharded in [False, True][: 1 + (count > 1)]:
        for recompute in (False, True):
            yield _split(policy, memory, count, sharded, recompute)


def _split(policy: Policy, memory: MemoryEstimate, count: int, sharded: bool, recompute: bool) -> Split:
    parts = dict(memory.parts)
    copies = parts.pop("copies in the compute type")
    activations = memory.recomputed if recompute else memory.activations
    if not sharded:
        return Split(count, False, recompute, parts, copies + memory.sampling, copies + activations)
    libraries = parts.pop("libraries")
    parts = {name: value / count for name, value in parts.items()} | {"libraries": libraries}
    whole = 2.0 * sum(p.numel() for p in policy.model.parameters())
    layers = max(1, getattr(policy.model.config.get_text_config(), "num_hidden_layers", 1))
    ends = 2.0 * policy.model.get_output_embeddings().weight.numel()
    gathered = 2 * whole / layers + 2 * ends  # this layer and the next, and both ends of the model
    return Split(count, True, recompute, parts, whole + memory.sampling, gathered + activations)


def _time(
    policy: Policy, recipe: Recipe, gpus: Gpus, split: Split, prompt_tokens: int
) -> tuple[dict[str, float], float]:
    """({phase: seconds}, bytes that each GPU sends), every completion as long as max_tokens allows."""
    loss, n, ranks = recipe.policy_loss(), recipe.samples_per_prompt, split.ranks
    prompts = -(-recipe.prompts_per_step // ranks)
    fed, tokens = prompts * n * (recipe.max_tokens - 1), prompts * n * recipe.max_tokens
    work = work_of(policy, prompts * prompt_tokens, fed, tokens)
    rate, sent = REACHED * gpus.tflops * 1e12, (ranks - 1) / ranks
    whole = 2.0 * sum(p.numel() for p in policy.model.parameters())
    trained = 4.0 * sum(p.numel() for p in policy.parameters())
    passes = recipe.epochs + (recipe.epochs * recipe.updates_per_step > 1 and loss.uses_old)
    passes += bool(loss.needs & {"ref_logp", "full_kl"}) or recipe.tracks_kl
    updates = recipe.epochs * recipe.updates_per_step
    micro = max(updates, math.ceil((prompts * prompt_tokens + fed) / recipe.micro_batch_tokens))
    again = work.forward * recipe.epochs * split.recompute
    crossing = sent * trained * updates * (1 if split.sharded else 2)
    if split.sharded:  # weights for each forward and each backward pass, and once for sampling
        crossing += sent * whole * (micro * (passes + recipe.epochs) + 1)
    seconds = {
        "sample": max(work.sample / rate, recipe.max_tokens * whole / (READ * gpus.bandwidth_gb * 1e9)),
        "log-probabilities and update": (passes * work.forward + recipe.epochs * work.backward + again) / rate,
        "between GPUs": crossing / (gpus.link_gb * 1e9),
    }
    return seconds, crossing


def _instead(recipe: Recipe, gpus: Gpus, prompt_tokens: int) -> Iterator[tuple[str, float]]:
    """Changes of the recipe or the machine after which it fits, with the bytes of a GPU."""
    changes: dict[str, Recipe] = {"micro_batch_tokens = 256": recipe.model_copy(update={"micro_batch_tokens": 256})}
    if not recipe.lora_rank:
        changes["lora_rank = 16"] = recipe.model_copy(update={"lora_rank": 16})
    for name, changed in changes.items():
        least = min(s.total for s in _splits(_without_weights(changed), changed, gpus.count, prompt_tokens))
        if least <= gpus.memory_gb * 1e9:
            yield name, least
    policy, count = _without_weights(recipe), 2 * gpus.count
    while count <= _MOST_GPUS:
        least = min(s.total for s in _splits(policy, recipe, count, prompt_tokens))
        if least <= gpus.memory_gb * 1e9:
            yield f"{count} GPUs of {gpus.memory_gb:g} GB", least
            return
        count *= 2
    least = min(s.total for s in _splits(policy, recipe, gpus.count, prompt_tokens))
    yield f"GPUs of {least / 1e9:.0f} GB", least

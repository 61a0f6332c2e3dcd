"""What a recipe takes on GPUs that are not here: memory by part, what crosses between them, and seconds a step.

Of the model its configuration alone is read: it is built without weights, so every count is that of the real one.
Memory is `estimate_memory`, as of a run; seconds follow from the rates that the caller names, and from the shares of
them that were measured on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from lossmith.errors import PolicyError, RecipeError
from lossmith.files import at_home
from lossmith.policy import Policy, can_checkpoint_activations, embedded_model
from lossmith.policy.adapter import add_adapter
from lossmith.policy.folder import adapter_base, check_config, find_config, in_brief
from lossmith.policy.narrow import hold_in_bfloat16
from lossmith.policy.quantized import NF4, as_if_quantized, bytes_held, is_quantized, numbers
from lossmith.policy.reading import check_head
from lossmith.policy.sharded import indivisible
from lossmith.policy.trial import attends_fully
from lossmith.training.memory import SIDE_BY_SIDE, MemoryEstimate, estimate_memory
from lossmith.training.recipe import Recipe
from lossmith.training.roofline import work_of

__all__ = ["Gpus", "HardwarePlan", "Split", "plan_hardware"]

# Of a product's rate, on a CPU: the means of benchmarks/results/roofline.json.
REACHED = {"sample": 0.31, "forward": 0.46, "backward": 0.47}
READ = 0.5  # of the memory's rate, by a token's pass over all weights: assumed
_MOST_GPUS = 4096
_WORTH_IT = 0.95  # of a step's seconds, for another setting to be named


@dataclass(frozen=True)
class Gpus:
    """What is there: memory of each in GB, and rates a second. Bytes cross between any two of them at `link`."""

    count: int
    memory_gb: float
    tflops: float = 800.0  # bfloat16 products without sparsity
    bandwidth_gb: float = 3000.0
    link_gb: float = 50.0

    def check(self) -> None:
        """RecipeError: numbers that are no machine."""
        names = ("gpus", "gpu_memory", "tflops", "bandwidth", "link")
        for name, value in zip(names, dataclasses.astuple(self), strict=True):
            if not (0 < value < math.inf):
                raise RecipeError(f"{name} = {value:g}: give a number above 0.")


@dataclass(frozen=True)
class Split:
    """One way to lay a run over its GPUs: as `shard` has it, with as many ranks; memory is that of one GPU.

    Without `shard` it is that of rank 0, which alone has the optimizer.
    """

    ranks: int
    sharded: bool
    recompute: bool
    memory: MemoryEstimate

    @property
    def update(self) -> float:
        return self.memory.recomputed if self.recompute else self.memory.activations

    @property
    def total(self) -> float:
        return self.memory.total(self.recompute)

    @property
    def name(self) -> str:
        how = "in parts" if self.sharded else "a whole copy each"
        gpus = "one GPU" if self.ranks == 1 else f"{self.ranks} GPUs, {how}"
        return gpus + (", layers run again" if self.recompute else "")


@dataclass(frozen=True)
class HardwarePlan:
    """splits: all that were looked at; chosen: the one that takes the least time of those that fit, None where none
    does. instead: what would fit then, in words, with the bytes of a GPU. faster: another micro_batch_tokens that fits,
    and the seconds of a step with it."""

    recipe: Recipe
    gpus: Gpus
    weights: int
    trained: int
    prompt_tokens: int
    splits: list[Split]
    chosen: Split | None
    seconds: dict[str, float] = field(default_factory=dict)  # of a step, by phase
    crossing: float = 0.0  # bytes that each GPU sends in a step
    indivisible: str = ""  # why its weights cannot be dealt out
    instead: list[tuple[str, float]] = field(default_factory=list)
    faster: tuple[int, float] | None = None

    @property
    def idle(self) -> int:
        """GPUs without a prompt."""
        return max(0, self.gpus.count - self.recipe.prompts_per_step)


@dataclass(frozen=True)
class _Models:
    """What a recipe has on a GPU, on none."""

    policy: Policy
    reference: Policy | None  # as a rank has it that holds whole weights: those of its layers in the type of products
    teacher: Policy | None

    @classmethod
    def of(cls, recipe: Recipe) -> _Models:
        policy, loss = _without_weights(recipe), recipe.policy_loss()
        reference = policy.frozen(narrow=True) if loss.needs & {"ref_logp", "full_kl"} or recipe.tracks_kl else None
        if recipe.teacher in (None, "self"):
            return cls(policy, reference, policy if recipe.teacher else None)
        taught = recipe.model_copy(update={"model": recipe.teacher, "lora_rank": 0})
        return cls(policy, reference, _without_weights(taught))

    def splits(self, recipe: Recipe, count: int, prompt_tokens: int) -> Iterator[Split]:
        own = recipe.model_copy(update={"prompts_per_step": -(-recipe.prompts_per_step // count)})
        again = [False, True] if can_checkpoint_activations(self.policy.model) else [False]
        for sharded in [False, True] if count > 1 and not indivisible(self.policy) else [False]:
            reference = self.policy.frozen() if sharded and self.reference is not None else self.reference
            parts = count if sharded else 1
            memory = estimate_memory(self.policy, own, reference, self.teacher, longest=prompt_tokens, parts=parts)
            yield from (Split(count, sharded, recompute, memory) for recompute in again)

    def least(self, recipe: Recipe, count: int, prompt_tokens: int) -> float:
        return min(split.total for split in self.splits(recipe, count, prompt_tokens))


def plan_hardware(recipe: Recipe, gpus: Gpus, *, prompt_tokens: int = 256) -> HardwarePlan:
    """Memory, split, communication and time of a recipe, whose `model` may be a config.json too.

    prompt_tokens: of the longest prompt. RecipeError: numbers that are no machine, or a recipe that is not for it;
    PolicyError: the model.
    """
    gpus.check()
    if recipe.engine != "lossmith":
        raise RecipeError(f"engine = {recipe.engine!r}: only the memory of engine = 'lossmith' is known.")
    if recipe.weights == "bfloat16" and gpus.count > 1:
        raise RecipeError(f"weights = 'bfloat16' is of one process, and {gpus.count} GPUs have one each: plan for one.")
    models = _Models.of(recipe)
    room = models.policy.context_length - recipe.max_tokens
    if not 0 < prompt_tokens <= room:
        raise RecipeError(
            f"prompt_tokens = {prompt_tokens}, and with max_tokens = {recipe.max_tokens} the model's context has room "
            f"for 1 to {room}."
        )
    why = indivisible(models.policy) if gpus.count > 1 else ""
    if recipe.shard and why:
        raise PolicyError(why)
    splits = list(models.splits(recipe, gpus.count, prompt_tokens))
    trained = sum(p.numel() for p in models.policy.parameters())
    weights = numbers(models.policy.model.parameters())
    found = HardwarePlan(recipe, gpus, weights, trained, prompt_tokens, splits, None, indivisible=why)
    best = _fastest(models, recipe, gpus, splits, prompt_tokens)
    if best is None:
        return dataclasses.replace(found, instead=list(_instead(models, recipe, gpus, prompt_tokens)))
    chosen, seconds, crossing = best
    faster = _faster(models, recipe, gpus, prompt_tokens, sum(seconds.values()))
    return dataclasses.replace(found, chosen=chosen, seconds=seconds, crossing=crossing, faster=faster)


def _fastest(
    models: _Models, recipe: Recipe, gpus: Gpus, splits: Iterable[Split], prompt_tokens: int
) -> tuple[Split, dict[str, float], float] | None:
    """Of those that fit: (it, seconds by phase, bytes that cross)."""
    fits = [split for split in splits if split.total <= gpus.memory_gb * 1e9]
    timed = [(split, *_time(models, recipe, gpus, split, prompt_tokens)) for split in fits]
    return min(timed, key=lambda row: sum(row[1].values()), default=None)


def _faster(models: _Models, recipe: Recipe, gpus: Gpus, prompt_tokens: int, now: float) -> tuple[int, float] | None:
    """Larger micro-batches: weights in parts cross once for each of them."""
    times = {}
    for size in (recipe.pass_tokens * 2**k for k in range(1, 7)):
        larger = recipe.model_copy(update={"micro_batch_tokens": size})
        best = _fastest(models, larger, gpus, models.splits(larger, gpus.count, prompt_tokens), prompt_tokens)
        if best is not None:
            times[size] = sum(best[1].values())
    size = min(times, key=lambda size: times[size], default=0)
    return (size, times[size]) if size and times[size] < _WORTH_IT * now else None


def _without_weights(recipe: Recipe) -> Policy:
    """The model that a configuration describes, on no device."""
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    name = str(recipe.model)
    base = adapter_base(name)
    if base is not None:
        raise PolicyError(f"{name!r} is a LoRA adapter: plan for its base model {base!r}, with lora_rank.")
    place = embedded_model() if name == "default" else at_home(name, PolicyError)
    local = place.exists()
    if not local and (name.endswith(".json") or name.startswith((".", "/", "~"))):
        raise PolicyError(f"there is no model folder or config.json {name!r}.")
    hint = "" if local else " Without a network, give its config.json: a copy of that file is all that is read."
    try:
        config = find_config(place, PolicyError) if local else PretrainedConfig.get_config_dict(name)[0]
        check_config(config, name, PolicyError, "policy")
        known = AutoConfig.from_pretrained(place if local else name, trust_remote_code=False)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(known, dtype=torch.float32, trust_remote_code=False)
    except PolicyError:
        raise
    except (
        Exception
    ) as problem:  # transformers alone runs here; of a damaged file or without a network it raises anything
        why = in_brief(problem) or type(problem).__name__
        raise PolicyError(f"cannot read the configuration of {name!r}: {why}{hint}") from None
    check_head(network, name)
    dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
    policy = Policy(network.eval(), None, dtype, float32_head=recipe.float32_head)
    policy.shares = attends_fully(policy)
    if recipe.weights == "bfloat16":
        hold_in_bfloat16(policy)
    if recipe.lora is not None:
        policy.adapter = add_adapter(network, recipe.lora, name)
        if dtype != torch.float32:
            policy.adapter.narrow_base(dtype, but=network.get_output_embeddings() if recipe.float32_head else None)
        if recipe.quantize is not None:
            as_if_quantized(network)
    return policy


def _time(
    models: _Models, recipe: Recipe, gpus: Gpus, split: Split, prompt_tokens: int
) -> tuple[dict[str, float], float]:
    """({phase: seconds}, bytes that each GPU sends), every completion as long as max_tokens allows."""
    loss, policy, n = recipe.policy_loss(), models.policy, recipe.samples_per_prompt
    prompts = -(-recipe.prompts_per_step // split.ranks)
    fed, tokens = prompts * n * (recipe.max_tokens - 1), prompts * n * recipe.max_tokens
    work = work_of(policy, prompts * prompt_tokens, fed, tokens)
    weights, trained = (4.0 * numbers(ps) for ps in (policy.model.parameters(), policy.parameters()))
    read = sum(bytes_held([p]) if is_quantized(p) else 2 * p.numel() for p in policy.model.parameters())
    updates = recipe.epochs * recipe.updates_per_step
    old = (updates > 1 and loss.uses_old) or loss.needs_old_early
    measured = old + (models.reference is not None) + (models.teacher is not None)  # passes without a gradient
    micro = max(recipe.updates_per_step, math.ceil((prompts * prompt_tokens + fed) / recipe.pass_tokens))
    shared = 2 * trained * updates  # gradients to rank 0, weights from there
    dealt = weights * (micro * (measured + 3 * recipe.epochs) + 1)  # once a pass, twice more a backward pass; to sample
    crossing = (dealt if split.sharded else shared) * (split.ranks - 1) / split.ranks
    rate = gpus.tflops * 1e12
    waves = math.ceil(prompts * n / SIDE_BY_SIDE)
    reading = waves * recipe.max_tokens * read / (READ * gpus.bandwidth_gb * 1e9)
    forward = work.forward * (measured + recipe.epochs * (1 + split.recompute))
    seconds = {
        "sample": max(work.sample / (REACHED["sample"] * rate), reading),
        "log-probabilities and update": (
            forward / (REACHED["forward"] * rate) + recipe.epochs * work.backward / (REACHED["backward"] * rate)
        ),
        "between GPUs": crossing / (gpus.link_gb * 1e9),
    }
    return seconds, crossing


def _instead(models: _Models, recipe: Recipe, gpus: Gpus, prompt_tokens: int) -> Iterator[tuple[str, float]]:
    """Changes of the recipe or the machine after which it fits, with the bytes of a GPU."""
    room = gpus.memory_gb * 1e9
    small = recipe.model_copy(update={"micro_batch_tokens": 256})
    options = {"micro_batch_tokens = 256": models.least(small, gpus.count, prompt_tokens)}
    if not recipe.lora_rank and not recipe.shard:
        adapted = recipe.model_copy(update={"lora_rank": 16})
        options["lora_rank = 16"] = _Models.of(adapted).least(adapted, gpus.count, prompt_tokens)
    if recipe.quantize is None and not recipe.shard and recipe.weights == "float32":
        narrow = recipe.model_copy(update={"lora_rank": recipe.lora_rank or 16, "quantize": NF4})
        named = "quantize = 'nf4'" if recipe.lora_rank else "lora_rank = 16, quantize = 'nf4'"
        options[named] = _Models.of(narrow).least(narrow, gpus.count, prompt_tokens)
    if gpus.count == 1 and not recipe.lora_rank and recipe.weights == "float32" and recipe.dtype != "float32":
        narrow = recipe.model_copy(update={"weights": "bfloat16"})
        options["weights = 'bfloat16'"] = _Models.of(narrow).least(narrow, 1, prompt_tokens)
    count = 2 * gpus.count
    while count <= _MOST_GPUS and models.least(recipe, count, prompt_tokens) > room:
        count *= 2
    if count <= _MOST_GPUS:
        options[f"{count} GPUs of {gpus.memory_gb:g} GB"] = models.least(recipe, count, prompt_tokens)
    yield from ((name, size) for name, size in options.items() if size <= room)
    least = models.least(recipe, gpus.count, prompt_tokens)
    yield f"GPUs of {math.ceil(least / 1e9)} GB", least

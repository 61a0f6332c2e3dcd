"""How much memory a run takes, and what is done where that is more than there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lossmith.errors import RecipeError
from lossmith.policy import Policy, available_bytes, sharing_is_exact
from lossmith.policy.attention import SCORES_AT_ONCE
from lossmith.policy.decode import ENCODED_AT_ONCE
from lossmith.training.recipe import Recipe

__all__ = ["MemoryEstimate", "check_memory", "estimate_memory"]

# Measured on the default model in bfloat16 with 512 to 2048 tokens: libraries and what the allocator leaves unused take
# 1.3 GB, and a layer keeps so many numbers of the hidden size a token for its backward pass; layers that are run again
# keep their input (in float32), and one of them at a time all.
_LIBRARIES = 1.3e9
_KEPT_PER_TOKEN = 32
_HEAD_ROWS = 512  # response positions whose logits exist at one time
_SIDE_BY_SIDE = 128  # completions that are written at one time
_SCORE_COPIES = 3  # scores, their softmax, and that in the type of the values


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. `fixed`: weights, gradients, optimizer, libraries; beside it sampling or a backward pass, never both."""

    fixed: float
    sampling: float  # keys and values of prompts and completions, and what encoding a prompt takes
    activations: float  # for the backward pass of a micro-batch
    recomputed: float  # activations where layers are run again
    budget: float | None  # what the recipe allows, or the machine has
    longest: int = 0  # tokens of the longest prompt

    @property
    def recompute(self) -> bool:
        """Whether it is too much, unless layers are run again in the backward pass."""
        return self.budget is not None and self.fixed + self.activations > self.budget

    def total(self, recompute: bool) -> float:
        """The most there is at one time; recompute: layers are run again in the backward pass."""
        return self.fixed + max(self.sampling, self.recomputed if recompute else self.activations)


@dataclass(frozen=True)
class _Sizes:
    """What a policy's memory depends on."""

    hidden: int
    inner: int  # the widest product of a layer
    layers: int
    heads: int
    cached: int  # numbers a token keeps in a layer: keys and values of all heads
    vocabulary: int
    width: int  # bytes of a number in a product

    @classmethod
    def of(cls, policy: Policy) -> _Sizes:
        config = policy.model.config.get_text_config()

        def number(name: str, otherwise: int) -> int:
            value = getattr(config, name, None)
            return value if type(value) is int and value > 0 else otherwise

        vocabulary, hidden = policy.model.get_output_embeddings().weight.shape
        hidden = number("hidden_size", hidden)
        heads = number("num_attention_heads", 1)
        key_heads, head = number("num_key_value_heads", heads), number("head_dim", max(hidden // heads, 1))
        linear = [m.out_features for m in policy.model.base_model.modules() if isinstance(m, nn.Linear)]
        return cls(
            hidden,
            max([*linear, hidden]),
            number("num_hidden_layers", 1),
            heads,
            2 * key_heads * head,
            vocabulary,
            2 if policy.compute_dtype == torch.bfloat16 else 4,
        )


def estimate_memory(
    policy: Policy,
    recipe: Recipe,
    reference: Policy | None,
    teacher: Policy | None = None,
    *,
    longest: int = 0,
    parts: int = 1,
) -> MemoryEstimate:
    """What training this policy with this recipe takes, with prompts of at most so many tokens.

    parts: into which weights, the reference's too, gradients and optimizer state are cut, of which a rank holds one.
    """
    size = _Sizes.of(policy)
    weights = list(policy.model.parameters())
    held = sum(p.numel() * p.element_size() for p in weights)  # beside an adapter, some of them in the compute type
    trained = sum(p.numel() for p in policy.parameters())
    narrow = sum(2 * p.numel() for p in weights) if size.width == 2 else 0
    copied, taught = (_own_bytes(one, policy) for one in (reference, teacher))
    fixed = (held + copied + 3 * 4 * trained) / parts + taught + narrow + _LIBRARIES
    tokens = _micro_batch(policy, recipe, longest)
    wide = 4 if policy.float32_head else size.width
    head = 2 * wide * _HEAD_ROWS * size.vocabulary
    if policy.model.get_output_embeddings().weight.requires_grad:
        head += 3 * 4 * size.vocabulary * size.hidden
    layer = tokens * size.hidden * _KEPT_PER_TOKEN * size.width
    once = head + _attention(size, tokens)
    return MemoryEstimate(
        fixed,
        _sampling(policy, size, recipe, longest) + (held if parts > 1 else 0),  # all of them, while it lasts
        once + size.layers * layer,
        once + layer + size.layers * tokens * size.hidden * 4,
        _budget(policy, recipe),
        longest,
    )


def _own_bytes(one: Policy | None, policy: Policy) -> int:
    """Of another model's weights; a reference may be the policy's own with its adapter off, a teacher the policy."""
    if one is None or one.model is policy.model:
        return 0
    return sum(p.numel() * p.element_size() for p in one.model.parameters())


def _micro_batch(policy: Policy, recipe: Recipe, longest: int) -> int:
    """Tokens: as many as the recipe says or a round has, but a prompt and its completion always stay together."""
    n, row = recipe.samples_per_prompt, longest + recipe.max_tokens
    group = longest + n * recipe.max_tokens if sharing_is_exact(policy) else n * row
    return max(row, min(recipe.pass_tokens, recipe.prompts_per_step * group))


def _attention(size: _Sizes, tokens: int) -> float:
    """Scores of a block of queries, and queries, keys and values laid side by side."""
    scores = min(SCORES_AT_ONCE, size.heads * tokens * min(_HEAD_ROWS, tokens))
    return _SCORE_COPIES * 4 * scores + 8 * 4 * tokens * size.hidden


def _sampling(policy: Policy, size: _Sizes, recipe: Recipe, longest: int) -> float:
    """Of the round; before and after the run, one completion of each held-out prompt is written, never more."""
    n = recipe.samples_per_prompt
    rows = min(_SIDE_BY_SIDE, recipe.prompts_per_step * n)
    prompts = min(recipe.prompts_per_step, 2 * -(-rows // min(n, _SIDE_BY_SIDE)))
    token = size.layers * size.cached * size.width
    together = max(longest, min(prompts * longest, ENCODED_AT_ONCE))
    encoding = together * (8 * size.hidden + 3 * size.inner) * 4 + _attention(size, together)
    if sharing_is_exact(policy):
        cached = (prompts * longest + 1.5 * rows * recipe.max_tokens) * token
    else:  # a copy of its prompt for each completion, and one layer's copies while they grow by a token
        cached = (prompts + rows) * (longest + recipe.max_tokens) * token * (1 + 1 / size.layers)
    step = rows * 4 * (_SCORE_COPIES * size.heads * (longest + recipe.max_tokens) + 3 * size.vocabulary)
    return cached + max(encoding, step)


def check_memory(memory: MemoryEstimate, recompute: bool, recipe: Recipe, source: str) -> None:
    """RecipeError where the run would take more than the machine has; source: where the longest prompt stands.

    A recipe that says how much it may take (memory_gb) knows better than an estimate.
    """
    total = memory.total(recompute)
    if recipe.memory_gb is not None or memory.budget is None or total <= memory.budget:
        return
    raise RecipeError(
        f"this run needs about {total / 1e9:.1f} GB of memory, and {memory.budget / 1e9:.1f} GB are free: the longest "
        f"prompt ({source}) has {memory.longest:,} tokens. Shorten or drop it, take a smaller model, or lower "
        "samples_per_prompt, prompts_per_step or micro_batch_tokens; "
        f"memory_gb = {-(-total // 1e9):.0f} starts the run all the same."
    )


def _budget(policy: Policy, recipe: Recipe) -> float | None:
    if recipe.memory_gb is not None:
        return recipe.memory_gb * 1e9
    if policy.device.type == "cuda":
        return float(torch.cuda.mem_get_info(policy.device)[0])
    free = available_bytes() if policy.device.type == "cpu" else None
    return None if free is None else free + 4 * sum(p.numel() for p in policy.model.parameters())  # they are loaded

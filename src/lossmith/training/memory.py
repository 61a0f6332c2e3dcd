"""How much memory a run takes, and what is done where that is more than there is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import nn

from lossmith.errors import RecipeError
from lossmith.policy import Policy, available_bytes, sharing_is_exact
from lossmith.policy.attention import SCORES_AT_ONCE
from lossmith.policy.decode import ENCODED_AT_ONCE
from lossmith.policy.head import STORED_BYTES
from lossmith.policy.lean import lean_layers
from lossmith.policy.quantized import bytes_held, is_quantized, numbers
from lossmith.training.recipe import Recipe

__all__ = ["SIDE_BY_SIDE", "MemoryEstimate", "check_memory", "estimate_memory"]

# Measured by benchmarks/planned_memory.py: what a process holds beside its tensors.
_LIBRARIES = 0.5e9
# Likewise what the C library's allocator leaves unused: a block as large as the logits, for which it finds no hole, and
# beside an adapter more than the activations take, for its many small products, gradients and averages lie between what
# is freed.
_UNUSED_BESIDE_ADAPTER = 1.35
_HEAD_ROWS = 512  # response positions whose logits exist at one time
SIDE_BY_SIDE = 128  # completions that are written at one time
_SCORE_COPIES = 3  # scores, their softmax, and that in the type of the values


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process. `fixed` is there all the time; beside it sampling or a backward pass, never both."""

    fixed: float
    sampling: float  # keys and values of prompts and completions, what encoding a prompt takes, copies of weights
    activations: float  # for the backward pass of a micro-batch, with its logits and copies of weights
    recomputed: float  # the same where layers are run again
    budget: float | None  # what the recipe allows, or the machine has
    longest: int = 0  # tokens of the longest prompt
    held: Mapping[str, float] = field(default_factory=dict)  # `fixed`, by what it is of
    opening: float = 0.0  # when the run begins: whole models, before they are dealt out, and no optimizer yet

    @property
    def recompute(self) -> bool:
        """Whether it is too much, unless layers are run again in the backward pass."""
        return self.budget is not None and self.fixed + self.activations > self.budget

    def total(self, recompute: bool) -> float:
        """The most there is at one time; recompute: layers are run again in the backward pass."""
        update = self.recomputed if recompute else self.activations
        return max(self.opening, self.fixed + max(self.sampling, update))


@dataclass(frozen=True)
class _Sizes:
    """What a policy's memory depends on."""

    hidden: int
    inner: int  # of the feed-forward part of a layer
    layers: int
    heads: int
    queries: int  # numbers of a token's queries in a layer, of all heads
    cached: int  # numbers a token keeps in a layer: keys and values of all heads
    normed: bool  # queries and keys are normalized
    vocabulary: int
    ends: int  # weights outside of layers: the embedding, and the head where that is another
    width: int  # bytes of a number in a product

    @classmethod
    def of(cls, policy: Policy) -> _Sizes:
        config = policy.model.config.get_text_config()

        def number(name: str, otherwise: int) -> int:
            value = getattr(config, name, None)
            return value if type(value) is int and value > 0 else otherwise

        ends = {
            id(m.weight): m.weight for m in (policy.model.get_input_embeddings(), policy.model.get_output_embeddings())
        }
        vocabulary, hidden = policy.model.get_output_embeddings().weight.shape
        hidden = number("hidden_size", hidden)
        heads = number("num_attention_heads", 1)
        key_heads, head = number("num_key_value_heads", heads), number("head_dim", max(hidden // heads, 1))
        linear = [m.out_features for m in policy.model.base_model.modules() if isinstance(m, nn.Linear)]
        return cls(
            hidden=hidden,
            inner=number("intermediate_size", max([*linear, hidden])),
            layers=number("num_hidden_layers", 1),
            heads=heads,
            queries=heads * head,
            cached=2 * key_heads * head,
            normed=any(name.endswith("q_norm") for name, _ in policy.model.named_modules()),
            vocabulary=vocabulary,
            ends=sum(w.numel() for w in ends.values()),
            width=2 if policy.compute_dtype == torch.bfloat16 else 4,
        )

    def kept(self, lean: Set[str] = frozenset()) -> int:
        """Bytes of a token that a layer of the usual kind (gated, normalized before) keeps for its backward pass.

        lean: kinds of modules that keep less (policy/lean.py). Float32: its input and the middle of it, each scaled as
        products read it; queries, keys, values, what they give, as the heads have it and as the product reads it; both
        branches of the feed-forward part. In bfloat16 what is normalized stays float32, and each of five products reads
        a copy of it. Where modules are not lean: what is normalized, before it is scaled; the gate's activation, and
        its product with the other branch.
        """
        norm, gated = "norm" not in lean, 2 if "gated" in lean else 4
        normed = 4 * (1 + norm) * (self.queries + self.cached // 2) if self.normed else 0
        if self.width == 4:
            return 4 * ((4 + 2 * norm) * self.hidden + 3 * self.queries + self.cached + gated * self.inner) + normed
        return (18 + 8 * norm) * self.hidden + 6 * self.queries + 2 * self.cached + 2 * gated * self.inner + normed


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
    whole = bytes_held(policy.model.parameters())  # beside an adapter, some are narrow, or in 4 bits
    trained = sum(p.numel() for p in policy.parameters())
    learned = float(sum(p.numel() * p.element_size() for p in policy.parameters()))
    carried = sum(2 * p.numel() for p in policy.parameters() if p.element_size() == 2)  # what bfloat16 rounds away
    copied, taught = (_own_bytes(one, policy) for one in (reference, teacher))
    held = {
        "weights": whole / parts,
        "gradients": learned / parts,  # each in the type of its weight
        "optimizer": (2 * learned + carried) / parts,
        "reference": copied / parts,
        "teacher": float(taught),
        "libraries": _LIBRARIES,
    }
    written, updated = _copies(policy, size)
    gathered = 0.0
    if parts > 1:  # while they last: all of them; in an update both ends of the model, two layers, and their gradients
        written += whole
        gathered = 8.0 * (size.ends + 2 * (trained - size.ends) / size.layers)
    tokens, responses = _micro_batch(policy, recipe, longest)
    passing = tokens * (4 * size.hidden + 3 * size.inner) * 4 + _attention(size, tokens)
    logits, slope = _head(policy, size, responses)
    beside = updated + gathered + logits + max(logits + slope, passing)
    taken = 1.0 if policy.adapter is None else 1.0 + _UNUSED_BESIDE_ADAPTER
    lean = {"gated" if hasattr(module, "up_proj") else "norm" for module, _ in lean_layers(policy)}
    return MemoryEstimate(
        fixed=sum(held.values()),
        sampling=_sampling(policy, size, recipe, longest) + written,
        activations=beside + taken * tokens * size.layers * size.kept(lean),
        recomputed=beside + taken * tokens * (size.kept() + size.layers * size.hidden * 4),
        budget=_budget(policy, recipe, whole + copied + taught),
        longest=longest,
        held=held,
        opening=_opening(policy) * (1 + bool(copied)) + taught + _LIBRARIES,
    )


def _opening(policy: Policy) -> float:
    """Weights as they are read: in float32, of which those that are quantized are one at a time."""
    weights = list(policy.model.parameters())
    quantized = [w for w in weights if is_quantized(w)]
    return 4.0 * numbers(w for w in weights if not is_quantized(w)) + bytes_held(quantized) + 4.0 * _largest(quantized)


def _largest(weights: Sequence[nn.Parameter]) -> int:
    return max((numbers([w]) for w in weights), default=0)


def _copies(policy: Policy, size: _Sizes) -> tuple[float, float]:
    """Bytes of weights in the type of products, beside those held: while completions are written, in an update."""
    whole = float(_largest([w for w in policy.model.parameters() if is_quantized(w)]))
    if size.width == 4:
        return 4 * whole, 4 * whole
    head = policy.model.get_output_embeddings() if policy.float32_head else None
    multiplied = {
        id(m.weight): m.weight
        for m in policy.model.modules()
        if m is not head and not isinstance(m, nn.Embedding) and getattr(getattr(m, "weight", None), "ndim", 0) > 1
        if not is_quantized(m.weight)  # one of those at a time; for a gradient, in float32 before it is narrowed
    }.values()
    cast = 2.0 * sum(w.numel() for w in multiplied if w.element_size() == 4)
    packed = 2.0 * sum(w.numel() for w in multiplied)  # on a CPU, whatever type they are held in
    return (packed if policy.device.type == "cpu" else cast) + 2 * whole, cast + 6 * whole


def _head(policy: Policy, size: _Sizes, responses: int) -> tuple[float, float]:
    """Of so many tokens: logits, and the gradient of the head's weights before it is added to what is there."""
    wide = 4 if policy.float32_head else size.width
    stored = responses * size.vocabulary * wide
    logits = stored if stored <= STORED_BYTES else 2 * wide * _HEAD_ROWS * size.vocabulary
    if not policy.model.get_output_embeddings().weight.requires_grad:
        return logits, 0.0
    once = wide == 4 and stored <= STORED_BYTES  # else a piece of it, or it in bfloat16, is there too
    return logits, (4.0 if once else 8.0) * size.vocabulary * size.hidden


def _own_bytes(one: Policy | None, policy: Policy) -> int:
    """Of another model's weights; a reference may be the policy's own with its adapter off, a teacher the policy."""
    if one is None or one.model is policy.model:
        return 0
    return bytes_held(one.model.parameters())


def _micro_batch(policy: Policy, recipe: Recipe, longest: int) -> tuple[int, int]:
    """(tokens, those of completions): as many as the recipe says or a round has, but a prompt and its completion stay
    together, and a quarter more where a prompt that is there already has more completions."""
    n, row = recipe.samples_per_prompt, longest + recipe.max_tokens
    shares = sharing_is_exact(policy) and n > 1
    group = longest + n * recipe.max_tokens if shares else n * row
    most = int(recipe.pass_tokens * (1.25 if shares else 1))
    tokens = max(row, min(most, recipe.prompts_per_step * group))
    return tokens, math.ceil(tokens * n * recipe.max_tokens / group)


def _attention(size: _Sizes, tokens: int) -> float:
    """Scores of a block of queries, and queries, keys and values laid side by side."""
    scores = min(SCORES_AT_ONCE, size.heads * tokens * min(_HEAD_ROWS, tokens))
    return _SCORE_COPIES * 4 * scores + 8 * 4 * tokens * size.hidden


def _sampling(policy: Policy, size: _Sizes, recipe: Recipe, longest: int) -> float:
    """Of the round; before and after the run, one completion of each held-out prompt is written, never more."""
    n = recipe.samples_per_prompt
    rows = min(SIDE_BY_SIDE, recipe.prompts_per_step * n)
    prompts = min(recipe.prompts_per_step, 2 * -(-rows // min(n, SIDE_BY_SIDE)))
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


def _budget(policy: Policy, recipe: Recipe, loaded: float) -> float | None:
    """loaded: bytes of models that are there already, and so are not free."""
    if recipe.memory_gb is not None:
        return recipe.memory_gb * 1e9
    if policy.device.type == "cuda":
        return float(torch.cuda.mem_get_info(policy.device)[0] + torch.cuda.memory_reserved(policy.device))
    free = available_bytes() if policy.device.type == "cpu" else None
    return None if free is None else free + loaded

"""Attention where completions share their prompt: one product over the prompt's keys for a whole group.

transformers passes queries, keys and values of every layer to the function that is registered here; the current plan
decides what is done with them. Plans: `TreeAttention` for a packed row of prompts and their completions (with
gradient), and that of the sampler (`decode.py`), which stores keys and values from one step to the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from lossmith.errors import PolicyError
from lossmith.policy.distribution import accumulation_dtype
from lossmith.policy.sending import sent

__all__ = ["AttentionPlan", "PrefixTree", "TreeAttention", "attending", "current_plan", "follow", "scaled_product"]

_NAME = "lossmith"
_BLOCK = 512  # queries of a stretch whose scores exist at one time, or fewer:
SCORES_AT_ONCE = 1 << 26  # about so many scores, whatever the length of a prompt
_current: list[AttentionPlan] = []


class AttentionPlan(Protocol):
    """What to do with the queries, keys and values of each time that the model attends.

    A plan lasts one forward pass. What it stores from one pass to the next is found by the order of the calls: some
    models attend twice a layer, or run a layer several times, so the number of a layer says too little.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[B, H, L, D] and twice [B, H_kv, L, D] -> [B, H, L, D]."""


@contextlib.contextmanager
def attending(model: Any, plan: AttentionPlan) -> Iterator[None]:
    """Within, the model's attention is the plan's. No masks are built: a plan knows which token sees which."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    before = [c._attn_implementation for c in configs]
    for config in configs:
        config._attn_implementation = _NAME
    _current.append(plan)
    try:
        yield
    finally:
        _current.pop()
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def follow(model: Any, plan: AttentionPlan, ids: Tensor, positions: Tensor) -> Tensor:
    """Last hidden states [B, L, H] of ids [B, L] at these positions, attending as the plan says."""
    with attending(model, plan):
        out = model.base_model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False)
    hidden: Tensor = out.last_hidden_state
    return hidden


def current_plan() -> AttentionPlan | None:
    """The plan that attention follows now, or None outside of `attending`."""
    return _current[-1] if _current else None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """The calling convention of transformers."""
    for name in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if options.get(name) is not None:
            raise PolicyError(f"{type(module).__name__} attends with {name}, which shared prompts do not support.")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    if torch.is_autocast_enabled(query.device.type):
        autocast_dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(autocast_dtype), key.to(autocast_dtype), value.to(autocast_dtype)
    with torch.autocast(query.device.type, enabled=False):
        out = _current[-1].attend(query, key, value, scale)
    return out.transpose(1, 2), None


@dataclass(frozen=True)
class PrefixTree:
    """A packed row: each prompt, then its completions one after the other. Places are those in the row."""

    ids: Tensor  # [L]
    positions: Tensor  # [L], of each token in its own sequence
    prompts: tuple[slice, ...]  # one for each group
    rows: tuple[tuple[int, int], ...]  # (first place, length) of each completion; length 0 where nothing is fed
    before: tuple[int, ...]  # place of the last prompt token of each completion
    shape: Tensor  # what attention needs to know: of each group the prompt's length, its completions, their lengths

    @classmethod
    def of(
        cls, groups: Sequence[tuple[tuple[int, ...], Sequence[tuple[int, ...]]]], device: torch.device
    ) -> PrefixTree:
        """groups: (prompt ids, ids that are fed of each completion)."""
        ids: list[int] = []
        positions: list[int] = []
        prompts, rows, before, shape = [], [], [], []
        for prompt, completions in groups:
            start = len(ids)
            ids += prompt
            positions += range(len(prompt))
            end = len(ids)
            for completion in completions:
                rows.append((len(ids), len(completion)))
                before.append(end - 1)
                ids += completion
                positions += range(len(prompt), len(prompt) + len(completion))
            prompts.append(slice(start, end))
            shape += [len(prompt), len(completions), *map(len, completions)]
        return cls(
            sent(ids, device),
            sent(positions, device),
            tuple(prompts),
            tuple(rows),
            tuple(before),
            torch.tensor(shape),
        )


class TreeAttention:
    """Each token sees its own prompt, and what came before it in its own completion."""

    def __init__(self, tree: PrefixTree) -> None:
        self.shape = tree.shape

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, _ = _attend_tree(query[0], key[0], value[0], self.shape, scale)
        return out[None]


@dataclass(frozen=True)
class _Layout:
    """A tree of some shape, laid out for products."""

    stretches: tuple[_Segments, ...]  # the prompts, and the completions where any feed something
    shared: tuple[tuple[slice, slice], ...]  # (prompt, completions that see it), in pieces whose scores are bounded


def _layout(shape: Tensor, device: torch.device) -> _Layout:
    return _layout_of(tuple(shape.tolist()), device)


@lru_cache(maxsize=8)
def _layout_of(shape: tuple[int, ...], device: torch.device) -> _Layout:
    """Cached, because all layers ask for the same."""
    prompts: list[tuple[int, int]] = []
    fed: list[tuple[int, int]] = []
    shared: list[tuple[slice, slice]] = []
    place = at = 0
    while at < len(shape):
        length, count = shape[at : at + 2]
        prompts.append((place, length))
        end = place + length
        for n in shape[at + 2 : at + 2 + count]:
            fed += [(end, n)] if n else []
            end += n
        size = max(1, min(4 * _BLOCK, SCORES_AT_ONCE // (16 * length)))  # 16: heads, about
        for start in range(place + length, end, size):
            shared.append((slice(place, place + length), slice(start, min(start + size, end))))
        place, at = end, at + 2 + count
    return _Layout(tuple(_Segments(x, place, device) for x in (prompts, fed) if x), tuple(shared))


class _Segments:
    """Stretches of the packed row, as an index into it that pads them to the longest."""

    def __init__(self, stretches: Sequence[tuple[int, int]], length: int, device: torch.device) -> None:
        self.width = max(n for _, n in stretches)
        starts = torch.tensor([a for a, _ in stretches])
        lengths = torch.tensor([n for _, n in stretches])
        steps = torch.arange(self.width)
        valid = steps < lengths[:, None]
        # A padded slot repeats the stretch's last place; it comes after all valid ones, so those never see it.
        self._places = sent(starts[:, None] + steps.minimum(lengths[:, None] - 1), device)
        self._valid = None if bool(valid.all()) else valid
        self._there = None if self._valid is None else sent(valid, device)  # to ask the device for places is a wait
        self._length = length
        self._cache: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def later(self, size: int, rep: int, dtype: torch.dtype) -> Tensor:
        """[1, rep * size, size]: -inf for keys after a query, to be added; made for the first layer only."""
        mask_key = (size, rep, dtype)
        if mask_key not in self._masks:
            full = torch.full((size, size), -torch.inf, dtype=dtype, device=self._places.device)
            self._masks[mask_key] = full.triu_(1).repeat(1, rep, 1)
        return self._masks[mask_key]

    def gather(self, x: Tensor, rep: int, zero_padding: bool = False) -> Tensor:
        """[H, L, ...] -> [H / rep * n, rep, W, ...]: the heads that share keys side by side; padding 0 if asked for."""
        index, _ = self._index(rep)
        flat = x.reshape(x.shape[0] // rep, rep * self._length, *x.shape[2:])
        gathered = flat.index_select(1, index).view(flat.shape[0], -1, rep, self.width, *x.shape[2:])
        if zero_padding and self._there is not None:
            gathered *= self._there[:, None].view(1, -1, 1, self.width, *[1] * (x.dim() - 2))
        return gathered.flatten(0, 1)

    def scatter(self, into: Tensor, x: Tensor, rep: int) -> None:
        """The reverse of gather, into [H, L, ...]; padded slots are left out."""
        index, valid = self._index(rep)
        flat = into.view(into.shape[0] // rep, rep * self._length, *into.shape[2:])
        x = x.reshape(flat.shape[0], len(index), *flat.shape[2:])
        if valid is not None:
            index, x = index[valid], x[:, valid]
        flat.index_copy_(1, index, x.to(flat.dtype))

    def _index(self, rep: int) -> tuple[Tensor, Tensor | None]:
        """(places in [rep * L], which of them are no padding), in the order stretch, head, place."""
        if rep not in self._cache:
            heads = torch.arange(rep, device=self._places.device)[None, :, None] * self._length
            index = (self._places[:, None] + heads).flatten()
            valid = None if self._valid is None else self._valid[:, None].expand(-1, rep, -1).flatten()
            self._cache[rep] = (index, None if valid is None else sent(valid.nonzero()[:, 0], index.device))
        return self._cache[rep]


# One operation for the compiler, which cannot look into it, and for autograd. Probabilities are not stored: the
# backward pass computes them again. A completion's token attends to its own completion and to its prompt in two
# products; what is stored is the share of the weights that its own completion has: softmax over both is share *
# softmax over the one beside (1 - share) * softmax over the other.
@torch.library.custom_op("lossmith::attend_tree", mutates_args=())
def _attend_tree(q: Tensor, k: Tensor, v: Tensor, shape: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[H, L, D], [H_kv, L, D], [H_kv, L, D] and the tree's shape -> (output [H, L, D], share [H, L])."""
    layout = _layout(shape, q.device)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=accumulation_dtype(q.dtype), device=q.device)
    share = torch.ones_like(lse)
    for segments in layout.stretches:
        _causal(q, k, v, segments, scale, out, lse)
    for prompt, branch in layout.shared:
        _add_prefix(q, k, v, prompt, branch, scale, out, lse, share)
    return out, share


@torch.library.custom_op("lossmith::attend_tree_backward", mutates_args=())
def _attend_tree_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, shape: Tensor, out: Tensor, share: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _layout(shape, q.device)
    grads = [torch.empty(x.shape, dtype=share.dtype, device=x.device) for x in (q, k, v)]
    pull = (grad.to(share.dtype) * out).sum(-1)  # [H, L], what the softmax subtracts
    own = _Pass(q, k, v, (grad * share[..., None]).to(q.dtype), pull * share, scale, grads)
    for segments in layout.stretches:
        _causal_backward(own, segments)
    share = 1 - share
    other = _Pass(q, k, v, (grad * share[..., None]).to(q.dtype), pull * share, scale, grads)
    for prompt, branch in layout.shared:
        _prefix_backward(other, prompt, branch)
    dq, dk, dv = (g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


@_attend_tree.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, shape: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))


@_attend_tree_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, shape: Tensor, out: Tensor, share: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, shape, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, shape, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attend_tree_backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


_attend_tree.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True)
class _Pass:
    """A backward pass through one of the two products. All are whole rows: [H, L, ...] or [H_kv, L, ...]."""

    q: Tensor
    k: Tensor
    v: Tensor
    outer: Tensor  # [H, L, D], the gradient of this product's output
    pull: Tensor  # [H, L], the sum of gradient times output, which the softmax subtracts
    scale: float
    grads: list[Tensor]  # of q, k, v, in float32 or wider: results are written or added here


def scaled_product(x: Tensor, y: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """scale * x y + mask, for [B, M, K], [B, K, N] and a mask that is broadcast to [B, M, N], in one pass."""
    if mask is None:
        return torch.baddbmm(x.new_empty(1, 1, 1), x, y, beta=0, alpha=scale)
    return torch.baddbmm(mask, x, y, alpha=scale)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B, M, K] -> (weights [B, M, K] that sum to one, log of the sum of exp(scores) [B, M]), float32 or wider.

    torch's softmax reads its input once. It does not return the sum, but any score and its weight give it: the first
    key's, which every query sees. Where that weight is too small, the sum is computed separately.
    """
    scores = scores.to(accumulation_dtype(scores.dtype))
    weights = torch.softmax(scores, -1)
    first = weights[..., 0]
    if scores.device.type == "cpu" and float(first.min()) > 1e-30:
        return weights, scores[..., 0] - first.log()
    return weights, scores.logsumexp(-1)


def _causal(q: Tensor, k: Tensor, v: Tensor, segments: _Segments, scale: float, out: Tensor, lse: Tensor) -> None:
    """Attention of each stretch to itself, into out and lse."""
    rep = q.shape[0] // k.shape[0]
    queries, keys, values = segments.gather(q, rep), segments.gather(k, 1)[:, 0], segments.gather(v, 1)[:, 0]
    means, sums = torch.empty_like(queries), torch.empty(queries.shape[:3], dtype=lse.dtype, device=q.device)
    for start, stop in _blocks(queries):
        weights, total = _softmax(_causal_scores(queries, keys, segments, start, stop, scale))
        shape = queries[:, :, start:stop].shape
        means[:, :, start:stop] = torch.bmm(weights.to(v.dtype), values[:, :stop]).view(shape)
        sums[:, :, start:stop] = total.view(shape[:3])
    segments.scatter(out, means, rep)
    segments.scatter(lse, sums, rep)


def _causal_scores(queries: Tensor, keys: Tensor, segments: _Segments, start: int, stop: int, scale: float) -> Tensor:
    """[B, rep * (stop - start), stop]: scores of these queries of each stretch, -inf for keys after them."""
    mask = segments.later(stop - start, queries.shape[1], queries.dtype)
    block, seen = queries[:, :, start:stop].flatten(1, 2), keys[:, :stop].transpose(1, 2)
    if start == 0:
        return scaled_product(block, seen, scale, mask)
    scores = scaled_product(block, seen, scale)
    scores[:, :, start:] += mask  # what comes before the block is seen by all of it
    return scores


def _blocks(queries: Tensor) -> Iterator[tuple[int, int]]:
    """Pieces of the places of [B, rep, W, D]."""
    width = queries.shape[2]
    size = max(1, min(_BLOCK, SCORES_AT_ONCE // (queries.shape[0] * queries.shape[1] * width)))
    return ((start, min(start + size, width)) for start in range(0, width, size))


def _add_prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt: slice,
    branch: slice,
    scale: float,
    out: Tensor,
    lse: Tensor,
    share: Tensor,
) -> None:
    """Let the completions of a group see their prompt too: one product for all of them."""
    weights, total = _softmax(scaled_product(_of_group(q, k, branch), k[:, prompt].transpose(1, 2), scale))
    branch_out = out[:, branch]
    mean = torch.bmm(weights.to(v.dtype), v[:, prompt]).view(branch_out.shape)
    own = torch.sigmoid(lse[:, branch] - total.view(branch_out.shape[:2]))
    share[:, branch] = own
    out[:, branch] = torch.lerp(mean.to(own.dtype), branch_out.to(own.dtype), own[..., None]).to(out.dtype)


def _of_group(x: Tensor, k: Tensor, branch: slice) -> Tensor:
    """[H, L, ...] -> [H_kv, rep * R, ...]: these places, the heads that share keys one after the other."""
    part = x[:, branch]
    return part.reshape(k.shape[0], -1, *x.shape[2:])


def _causal_backward(backward: _Pass, segments: _Segments) -> None:
    rep = backward.q.shape[0] // backward.k.shape[0]
    queries = segments.gather(backward.q, rep)
    keys, values = segments.gather(backward.k, 1)[:, 0], segments.gather(backward.v, 1)[:, 0]
    outer, pulls = (segments.gather(x, rep, zero_padding=True) for x in (backward.outer, backward.pull))
    dq = torch.empty_like(queries)
    dk, dv = (torch.zeros(x.shape, dtype=backward.pull.dtype, device=x.device) for x in (keys, values))
    for start, stop in _blocks(queries):
        scores = _causal_scores(queries, keys, segments, start, stop, backward.scale)
        block, outers = (x[:, :, start:stop].flatten(1, 2) for x in (queries, outer))
        pull = pulls[:, :, start:stop].flatten(1)
        parts = _product_backward(scores, block, outers, keys[:, :stop], values[:, :stop], pull, backward.scale)
        dq[:, :, start:stop] = parts[0].view(dq[:, :, start:stop].shape)
        dk[:, :stop] += parts[1]
        dv[:, :stop] += parts[2]
    for whole, part, heads in zip(backward.grads, (dq, dk, dv), (rep, 1, 1), strict=True):
        segments.scatter(whole, part, heads)


def _prefix_backward(backward: _Pass, prompt: slice, branch: slice) -> None:
    queries, outer, pull = (_of_group(x, backward.k, branch) for x in (backward.q, backward.outer, backward.pull))
    keys, values = backward.k[:, prompt], backward.v[:, prompt]
    scores = scaled_product(queries, keys.transpose(1, 2), backward.scale)
    dq, dk, dv = _product_backward(scores, queries, outer, keys, values, pull, backward.scale)
    backward.grads[0][:, branch] += dq.view(backward.q[:, branch].shape)
    backward.grads[1][:, prompt] += dk
    backward.grads[2][:, prompt] += dv


def _product_backward(
    scores: Tensor, queries: Tensor, outer: Tensor, keys: Tensor, values: Tensor, pull: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of softmax(q k^T) v for one block of queries, given its scores [B, M, K]."""
    dtype = queries.dtype
    weights = torch.softmax(scores.to(accumulation_dtype(dtype)), -1)
    dv = torch.bmm(weights.to(dtype).transpose(1, 2), outer)
    grad_weights = torch.bmm(outer, values.transpose(1, 2)).to(weights.dtype)
    grad_scores = grad_weights.sub_(pull[..., None]).mul_(weights).to(dtype)
    return scaled_product(grad_scores, keys, scale), scaled_product(grad_scores.transpose(1, 2), queries, scale), dv

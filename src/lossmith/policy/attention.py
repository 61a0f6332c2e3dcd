"""Attention where completions share their prompt: one product over the prompt's keys for a whole group.

transformers hands queries, keys and values of every layer to the function that is registered here; what is done with
them is the plan's business. Plans: `TreeAttention` for a packed row of prompts and their completions (with gradient),
and that of the sampler (`decode.py`), which keeps keys and values from one step to the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lossmith.errors import PolicyError
from lossmith.policy.measure import wide

__all__ = ["Plan", "Tree", "TreeAttention", "attending", "current_plan", "follow", "scores"]

_NAME = "lossmith"
_BLOCK = 512  # queries whose scores exist at one time
_current: list[Plan] = []


class Plan(Protocol):
    """What to do with the queries, keys and values of one layer."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[B, H, L, D] and twice [B, H_kv, L, D] -> [B, H, L, D]."""


@contextlib.contextmanager
def attending(model: Any, plan: Plan) -> Iterator[None]:
    """Within, the model's attention is the plan's. Masks are not made, for plans know who sees whom."""
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


def follow(model: Any, plan: Plan, ids: Tensor, positions: Tensor) -> Tensor:
    """Last hidden states [B, L, H] of ids [B, L] at these positions, attending as the plan says."""
    with attending(model, plan):
        out = model.base_model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False)
    hidden: Tensor = out.last_hidden_state
    return hidden


def current_plan() -> Plan | None:
    """The plan that attention follows now, or None outside of `attending`."""
    return _current[-1] if _current else None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: Any = None, **more: Any
) -> tuple[Tensor, None]:
    """The calling convention of transformers."""
    for name in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if more.get(name) is not None:
            raise PolicyError(f"{type(module).__name__} attends with {name}, which shared prompts do not know.")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    if torch.is_autocast_enabled(query.device.type):
        narrow = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    with torch.autocast(query.device.type, enabled=False):
        out = _current[-1].attend(module.layer_idx, query, key, value, scale)
    return out.transpose(1, 2), None


def scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[B, M, D], [B, K, D] -> [B, M, K] scaled products in float32 or wider."""
    product = torch.bmm(query, key.transpose(1, 2))
    return product.to(wide(product.dtype)).mul_(scale)


def _merge(lse: Tensor, other: Tensor, out: Tensor, addition: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: (log of the summed weights, weighted mean)."""
    both = torch.logaddexp(lse, other)
    mean = out * (lse - both).exp_()[..., None] + addition * (other - both).exp_()[..., None]
    return both, mean


@dataclass(frozen=True)
class Tree:
    """A packed row: each prompt, then its completions one after the other. Places are those in the row."""

    ids: Tensor  # [L]
    positions: Tensor  # [L], of each token in its own sequence
    prompts: tuple[slice, ...]  # one for each group
    branches: tuple[slice, ...]  # all completions of the group together
    rows: tuple[tuple[int, int], ...]  # (first place, length) of each completion; length 0 where nothing is fed
    before: tuple[int, ...]  # place of the last prompt token of each completion

    @classmethod
    def of(cls, groups: Sequence[tuple[tuple[int, ...], Sequence[tuple[int, ...]]]], device: torch.device) -> Tree:
        """groups: (prompt ids, ids that are fed of each completion)."""
        ids: list[int] = []
        positions: list[int] = []
        prompts, branches, rows, before = [], [], [], []
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
            branches.append(slice(end, len(ids)))
        return cls(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            tuple(prompts),
            tuple(branches),
            tuple(rows),
            tuple(before),
        )


class TreeAttention:
    """Each token sees its own prompt, and what came before it in its own completion."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        device = tree.ids.device
        self.prompts = _Segments([(s.start, s.stop - s.start) for s in tree.prompts], len(tree.ids), device)
        fed = [row for row in tree.rows if row[1]]
        self.branches = _Segments(fed, len(tree.ids), device) if fed else None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return _TreeProduct.apply(query[0], key[0], value[0], self, scale)[None]


class _Segments:
    """Stretches of the packed row, as an index into it that pads them to the longest."""

    def __init__(self, stretches: Sequence[tuple[int, int]], length: int, device: torch.device) -> None:
        self.width = max(n for _, n in stretches)
        starts = torch.tensor([a for a, _ in stretches])
        lengths = torch.tensor([n for _, n in stretches])
        steps = torch.arange(self.width)
        valid = steps < lengths[:, None]
        # A padded slot repeats the stretch's last place; it comes after all valid ones, so those never see it.
        self._places = (starts[:, None] + steps.minimum(lengths[:, None] - 1)).to(device)
        self._valid = None if bool(valid.all()) else valid.to(device)
        self._length = length
        self._cache: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._later: dict[tuple[int, int], Tensor] = {}

    def later(self, start: int, stop: int) -> Tensor:
        """[stop - start, stop]: which keys come after each of these queries; made for the first layer only."""
        if (start, stop) not in self._later:
            places = torch.arange(stop, device=self._places.device)
            self._later[start, stop] = places > places[start:, None]
        return self._later[start, stop]

    def gather(self, x: Tensor, rep: int, blank: bool = False) -> Tensor:
        """[H, L, ...] -> [H / rep * n, rep, W, ...]: the heads that share keys side by side. blank: padding is 0."""
        index, _ = self._index(rep)
        flat = x.reshape(x.shape[0] // rep, rep * self._length, *x.shape[2:])
        found = flat.index_select(1, index).view(flat.shape[0], -1, rep, self.width, *x.shape[2:])
        if blank and self._valid is not None:
            found *= self._valid[:, None].view(1, -1, 1, self.width, *[1] * (x.dim() - 2))
        return found.flatten(0, 1)

    def scatter(self, into: Tensor, x: Tensor, rep: int) -> None:
        """The reverse of gather, into [H, L, ...]; what stands in padded slots is left out."""
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
            self._cache[rep] = (index, None if valid is None else valid.nonzero()[:, 0])
        return self._cache[rep]


class _TreeProduct(torch.autograd.Function):
    """Attention over the tree. Probabilities are not kept: the backward pass makes them again from their sums."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: TreeAttention, scale: float) -> Tensor:
        """[H, L, D], [H_kv, L, D], [H_kv, L, D] -> [H, L, D]."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=wide(q.dtype), device=q.device)
        for segments in filter(None, (plan.prompts, plan.branches)):
            _causal(q, k, v, segments, scale, out, lse)
        for prompt, branch in _shared_parts(plan.tree):
            _add_prefix(q, k, v, prompt, branch, scale, out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            grad = grad.contiguous()
            pull = (grad.to(lse.dtype) * out).sum(-1)  # [H, L], what the softmax subtracts
            grads = [torch.empty(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v)]
            for segments in filter(None, (ctx.plan.prompts, ctx.plan.branches)):
                _causal_backward(q, k, v, segments, ctx.scale, grad, lse, pull, grads)
            for prompt, branch in _shared_parts(ctx.plan.tree):
                _prefix_backward(q, k, v, prompt, branch, ctx.scale, grad, lse, pull, grads)
        dq, dk, dv = (g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv, None, None


def _shared_parts(tree: Tree) -> Iterator[tuple[slice, slice]]:
    """(prompt, completions) of each group that feeds any, in pieces whose scores are bounded."""
    for prompt, branch in zip(tree.prompts, tree.branches, strict=True):
        for start in range(branch.start, branch.stop, 4 * _BLOCK):
            yield prompt, slice(start, min(start + 4 * _BLOCK, branch.stop))


def _causal(q: Tensor, k: Tensor, v: Tensor, segments: _Segments, scale: float, out: Tensor, lse: Tensor) -> None:
    """Attention of each stretch to itself, into out and lse."""
    rep = q.shape[0] // k.shape[0]
    queries, keys, values = segments.gather(q, rep), segments.gather(k, 1)[:, 0], segments.gather(v, 1)[:, 0]
    means, sums = torch.empty_like(queries), torch.empty(queries.shape[:3], dtype=lse.dtype, device=q.device)
    for start, stop in _blocks(segments.width):
        weights = _causal_scores(queries, keys, segments.later(start, stop), start, stop, scale)
        total = _softmax_(weights)
        shape = queries[:, :, start:stop].shape
        means[:, :, start:stop] = torch.bmm(weights.to(v.dtype), values[:, :stop]).view(shape)
        sums[:, :, start:stop] = total.view(shape[:3])
    segments.scatter(out, means, rep)
    segments.scatter(lse, sums, rep)


def _causal_scores(queries: Tensor, keys: Tensor, later: Tensor, start: int, stop: int, scale: float) -> Tensor:
    """[B, rep * (stop - start), stop]: scores of these queries of each stretch, -inf for keys after them."""
    found = scores(queries[:, :, start:stop].flatten(1, 2), keys[:, :stop], scale)
    found.unflatten(1, (queries.shape[1], -1)).masked_fill_(later, -torch.inf)
    return found


def _softmax_(weights: Tensor) -> Tensor:
    """Scores become weights that sum to one, in place; returns the logarithm of what they were divided by."""
    most = weights.amax(-1, keepdim=True)
    total = weights.sub_(most).exp_().sum(-1, keepdim=True)
    weights.div_(total)
    return (total.log_() + most)[..., 0]


def _blocks(width: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _BLOCK, width)) for start in range(0, width, _BLOCK))


def _add_prefix(
    q: Tensor, k: Tensor, v: Tensor, prompt: slice, branch: slice, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Let the completions of a group see their prompt too: one product for all of them."""
    queries = _of_group(q, k, branch)
    weights = scores(queries, k[:, prompt], scale)
    total = _softmax_(weights)
    mean = torch.bmm(weights.to(v.dtype), v[:, prompt])
    mine, others = out[:, branch], lse[:, branch]
    shape = mine.shape
    both, merged = _merge(others, total.view(shape[:2]), mine, mean.view(shape))
    lse[:, branch], out[:, branch] = both, merged.to(out.dtype)


def _of_group(x: Tensor, k: Tensor, branch: slice) -> Tensor:
    """[H, L, ...] -> [H_kv, rep * R, ...]: these places, the heads that share keys one after the other."""
    part = x[:, branch]
    return part.reshape(k.shape[0], -1, *x.shape[2:])


def _causal_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: _Segments,
    scale: float,
    grad: Tensor,
    lse: Tensor,
    pull: Tensor,
    grads: list[Tensor],
) -> None:
    rep = q.shape[0] // k.shape[0]
    queries, keys, values = segments.gather(q, rep), segments.gather(k, 1)[:, 0], segments.gather(v, 1)[:, 0]
    sums = segments.gather(lse, rep)
    outer, pulls = (segments.gather(x, rep, blank=True) for x in (grad, pull))
    dq = torch.empty_like(queries)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (keys, values))
    for start, stop in _blocks(segments.width):
        weights = _causal_scores(queries, keys, segments.later(start, stop), start, stop, scale)
        weights.sub_(sums[:, :, start:stop].flatten(1)[..., None]).exp_()
        block, outers = (x[:, :, start:stop].flatten(1, 2) for x in (queries, outer))
        found = _product_backward(
            block, outers, keys[:, :stop], values[:, :stop], weights, pulls[:, :, start:stop].flatten(1), scale
        )
        dq[:, :, start:stop] = found[0].view(dq[:, :, start:stop].shape)
        dk[:, :stop] += found[1]
        dv[:, :stop] += found[2]
    for whole, part, heads in zip(grads, (dq, dk, dv), (rep, 1, 1), strict=True):
        segments.scatter(whole, part, heads)


def _prefix_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt: slice,
    branch: slice,
    scale: float,
    grad: Tensor,
    lse: Tensor,
    pull: Tensor,
    grads: list[Tensor],
) -> None:
    queries, outer, sums, pulls = (_of_group(x, k, branch) for x in (q, grad, lse, pull))
    weights = scores(queries, k[:, prompt], scale).sub_(sums[..., None]).exp_()
    dq, dk, dv = _product_backward(queries, outer, k[:, prompt], v[:, prompt], weights, pulls, scale)
    grads[0][:, branch] += dq.view(q[:, branch].shape)
    grads[1][:, prompt] += dk
    grads[2][:, prompt] += dv


def _product_backward(
    queries: Tensor, outer: Tensor, keys: Tensor, values: Tensor, weights: Tensor, pulls: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of softmax(q k^T) v for one block of queries, given its weights [B, M, K]."""
    narrow = queries.dtype
    dv = torch.bmm(weights.to(narrow).transpose(1, 2), outer)
    slope = scores(outer, values, 1.0).sub_(pulls[..., None]).mul_(weights).mul_(scale).to(narrow)
    return torch.bmm(slope, keys), torch.bmm(slope.transpose(1, 2), queries), dv

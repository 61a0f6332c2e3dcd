"""Writing completions token by token: which rows are decoded side by side, and how the next token is chosen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lossmith.errors import PolicyError
from lossmith.policy.decode import Cache, PlainCache, SharedCache
from lossmith.policy.distribution import SamplingSettings, log_softmax_under
from lossmith.policy.load import Policy
from lossmith.policy.sending import sent
from lossmith.prompts import Prompt
from lossmith.rollouts import FinishReason

__all__ = ["OpenCompletion", "inverse_of_cumulative", "make_cache", "write"]

_CACHED = 32  # rows whose probabilities a processor works on at a time: few enough to stay in its cache


@dataclass
class OpenCompletion:
    """One completion while it is being written."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    sample: int
    uniforms: np.ndarray
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finish: FinishReason | None = None


def make_cache(
    policy: Policy, pending: deque[list[OpenCompletion]], settings: SamplingSettings, batch_rows: int, shared: bool
) -> Cache:
    """For these groups of rows, at most `batch_rows` side by side; `shared`: each prompt is kept once."""
    if not shared:
        return PlainCache(policy, batch_rows)
    sizes = [len(group) for group in pending]
    rows = min(batch_rows, sum(sizes))
    at_once = min(len(pending), 2 * -(-rows // max(sizes)))
    longest = max(len(group[0].prompt_ids) for group in pending)
    return SharedCache(policy, rows, at_once, longest, settings.max_tokens - 1)


@torch.no_grad()
def write(
    policy: Policy,
    cache: Cache,
    pending: deque[list[OpenCompletion]],
    settings: SamplingSettings,
    finish: Callable[[OpenCompletion], None],
) -> Iterator[list[OpenCompletion]]:
    """Fill in ids and log-probabilities; yields the rows that have just ended: those that `finish` gave a reason.

    Rows that end leave, and rows of the next prompt take their place.
    """
    active: list[OpenCompletion] = []
    hidden = torch.empty(0)
    while active or pending:
        fresh = _next_groups(cache, pending)
        if fresh:
            first = cache.add(*_described(fresh))
            hidden = torch.cat([hidden, first]) if active else first
            active += [row for group in fresh for row in group]
        chosen = _choose(policy.logits(hidden), active, settings)
        for row in active:
            finish(row)
        going = _remaining([row.finish is None for row in active])
        if len(going) < len(active):
            yield [row for row in active if row.finish is not None]
            cache.keep(going)
            active, chosen = [active[i] for i in going], chosen[going]
        if active:
            hidden = cache.step(chosen)


def _next_groups(cache: Cache, pending: deque[list[OpenCompletion]]) -> list[list[OpenCompletion]]:
    """As many groups as there is room for, taken from those that wait."""
    next_groups: list[list[OpenCompletion]] = []
    while pending and cache.room(*_described([*next_groups, pending[0]])):
        next_groups.append(pending.popleft())
    return next_groups


def _described(groups: list[list[OpenCompletion]]) -> tuple[list[tuple[int, ...]], list[int]]:
    return [group[0].prompt_ids for group in groups], [len(group) for group in groups]


def _remaining(going: list[bool]) -> list[int]:
    """Which rows go on, in an order that moves few: the last ones take the places of those that ended."""
    count = sum(going)
    late = [i for i in range(count, len(going)) if going[i]]
    return [i if going[i] else late.pop() for i in range(count)]


def _choose(logits: Tensor, rows: list[OpenCompletion], settings: SamplingSettings) -> Tensor:
    """Append one token to each row, and return their ids [rows]: the inverse of the cumulative distribution at u."""
    if settings.temperature == 0:
        _check_finite(logits.amax(-1))
        ids = logits.argmax(-1)
        logp = torch.zeros(len(ids))  # the greedy choice has probability 1
    else:
        u = sent([row.uniforms[len(row.ids)] for row in rows], logits.device, torch.float64)
        size = _CACHED if logits.device.type == "cpu" else len(rows)  # elsewhere each piece would be waited for
        pieces = [_drawn(x, v, settings) for x, v in zip(logits.split(size), u.split(size), strict=True)]
        ids, logp = (torch.cat(column) for column in zip(*pieces, strict=True))
    for row, token, value in zip(rows, ids.tolist(), logp.tolist(), strict=True):
        row.ids.append(token)
        row.logp.append(value)
    return ids


def _drawn(logits: Tensor, u: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """([M] ids, [M] log-probabilities). The logits are used up."""
    if settings.filtered:
        weights = log_softmax_under(logits, settings)
        _check_finite(weights.amax(-1))
    else:
        weights = logits if settings.temperature == 1 else logits.div_(settings.temperature)
        most = weights.amax(-1, keepdim=True)
        _check_finite(most)
        weights.sub_(most)
    weights.exp_()
    ids, total = inverse_of_cumulative(weights, u)
    return ids, weights.gather(1, ids[:, None])[:, 0].log() - total.log().to(weights.dtype)


def inverse_of_cumulative(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """[M, V] weights and [M] numbers in [0, 1) -> ([M] first ids whose cumulative share exceeds u, [M] sums).

    An id of weight 0 is never taken. Sums of stretches come first, and only one stretch is then searched: the
    cumulative sum of a whole vocabulary takes longer than the matrix products of a step.
    """
    stretch = 256
    short = -weights.shape[1] % stretch
    stretches = (torch.nn.functional.pad(weights, (0, short)) if short else weights).unflatten(1, (-1, stretch))
    cumulative = stretches.sum(-1).double().cumsum(-1)
    total = cumulative[:, -1]
    mark = torch.minimum(u * total, _just_below(total))
    chosen = torch.searchsorted(cumulative, mark[:, None], right=True)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(1, chosen)
    inside = stretches[torch.arange(len(u), device=u.device), chosen[:, 0]].double().cumsum(-1)
    rest = torch.minimum(mark[:, None] - before, _just_below(inside[:, -1:]))
    return chosen[:, 0] * stretch + torch.searchsorted(inside, rest, right=True)[:, 0], total


def _just_below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.zeros_like(x))


def _check_finite(largest: Tensor) -> None:
    """The largest of a row with a NaN is NaN."""
    if not torch.isfinite(largest).all():
        raise PolicyError("the model's logits are not finite: its weights are damaged, or training has diverged.")

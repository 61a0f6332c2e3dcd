"""Sampling: y ~ π_θ(.|x), with everything recorded that training needs.

Prompts are encoded once, whatever the number of completions. Random numbers are keyed by (seed, step, prompt, sample):
one uniform number a token, so what is sampled does not depend on batching, order or resumption (up to the rounding of
matrix products, which a different batch shape can change in the last digits).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lossmith.errors import PolicyError
from lossmith.policy.compiled import uncompiled
from lossmith.policy.decode import Cache, PlainCache, SharedCache
from lossmith.policy.forward import sharing_is_exact
from lossmith.policy.load import Policy
from lossmith.policy.log_probs import measure_of
from lossmith.policy.measure import SamplingSettings, measured_log_softmax
from lossmith.policy.packed import packed_weights
from lossmith.prompts import Prompt
from lossmith.rollouts import FinishReason, LogProbs, Measure, Rollout

__all__ = ["check_samples", "inverse_of_cumulative", "sample", "uniforms"]

_CACHED = 32  # rows whose probabilities are worked on at a time: few enough to stay in the processor's cache


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    n: int,
    settings: SamplingSettings,
    *,
    seed: int,
    step: int,
    batch_rows: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
    on_group: Callable[[list[Rollout]], None] | None = None,
) -> list[Rollout]:
    """n completions of each prompt, prompt by prompt.

    batch_rows: completions that are decoded side by side. on_progress(done, of) is called when some have ended,
    on_group when all completions of a prompt have, while those of other prompts are still being written.
    PolicyError: n copies of a greedy completion, or a prompt too long for the model's context.
    """
    check_samples(n, settings)
    encoded = [_encoded(policy, prompt, settings) for prompt in prompts]
    distinct = list({prompt.id: p for p, prompt in enumerate(prompts)}.values())
    order = sorted(distinct, key=lambda p: len(encoded[p]))  # prompts of like length side by side
    pending = deque(
        [_Row(prompts[p], encoded[p], k, uniforms(seed, step, prompts[p].id, k, settings)) for k in ks]
        for p in order
        for ks in _portions(n, batch_rows)
    )
    total = sum(map(len, pending))
    measure = measure_of(policy, settings)
    written: dict[str, list[Rollout]] = {prompt.id: [] for prompt in prompts}
    done = 0
    cache = _cache(policy, pending, settings, batch_rows)
    with uncompiled(), policy.autocast(), packed_weights(policy):
        for ended in _decode(policy, cache, pending, settings):
            done += len(ended)
            for row in ended:
                group = written[row.prompt.id]
                group.append(_rollout(policy, row, settings, measure))
                if len(group) == n:
                    group.sort(key=lambda r: r.sample)
                    if on_group is not None:
                        on_group(group)
            if on_progress is not None:
                on_progress(done, total)
    return [rollout for prompt in prompts for rollout in written[prompt.id]]


def _portions(n: int, size: int) -> list[range]:
    """range(n) in pieces of at most `size`."""
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def check_samples(n: int, settings: SamplingSettings) -> None:
    """PolicyError where n completions of a prompt cannot be had, would be copies of one, or noise."""
    if n < 1:
        raise PolicyError(f"n = {n}, but at least one completion a prompt is needed.")
    if settings.greedy and n > 1:
        raise PolicyError(f"{settings.greedy} with n = {n} would give {n} copies of one completion.")
    if settings.noise:
        raise PolicyError(f"{settings.noise} would give noise: every token is then about as likely as any other.")


def uniforms(seed: int, step: int, prompt_id: str, sample: int, settings: SamplingSettings) -> np.ndarray:
    """[max_tokens] numbers in [0, 1), a function of their key alone (Philox, a counter-based generator)."""
    key = hashlib.blake2b(f"{seed}/{step}/{prompt_id}/{sample}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(settings.max_tokens)


@dataclass
class _Row:
    """One completion while it is being written."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    sample: int
    uniforms: np.ndarray
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finish: FinishReason | None = None


def _encoded(policy: Policy, prompt: Prompt, settings: SamplingSettings) -> tuple[int, ...]:
    ids = policy.encode(prompt)
    if len(ids) + settings.max_tokens > policy.context_length:
        raise PolicyError(
            f"{prompt.source}: the prompt's {len(ids)} tokens and max_tokens = {settings.max_tokens} exceed the "
            f"model's context of {policy.context_length}."
        )
    return ids


@torch.no_grad()
def _decode(
    policy: Policy, cache: Cache, pending: deque[list[_Row]], settings: SamplingSettings
) -> Iterator[list[_Row]]:
    """Fill in ids, log-probabilities and finish reasons; yields the rows that have just ended.

    Rows that end leave, and rows of the next prompt take their place.
    """
    active: list[_Row] = []
    hidden, ends = torch.empty(0), policy.eos_ids
    while active or pending:
        fresh = _next_groups(cache, pending)
        if fresh:
            first = cache.add(*_described(fresh))
            hidden = torch.cat([hidden, first]) if active else first
            active += [row for group in fresh for row in group]
        chosen = _choose(policy.logits(hidden), active, settings)
        _finish(policy, active, ends, settings)
        going = _remaining([row.finish is None for row in active])
        if len(going) < len(active):
            yield [row for row in active if row.finish is not None]
            cache.keep(going)
            active, chosen = [active[i] for i in going], chosen[going]
        if active:
            hidden = cache.step(chosen)


def _next_groups(cache: Cache, pending: deque[list[_Row]]) -> list[list[_Row]]:
    """As many groups as there is room for, taken from those that wait."""
    taken: list[list[_Row]] = []
    while pending and cache.room(*_described([*taken, pending[0]])):
        taken.append(pending.popleft())
    return taken


def _described(groups: list[list[_Row]]) -> tuple[list[tuple[int, ...]], list[int]]:
    return [group[0].prompt_ids for group in groups], [len(group) for group in groups]


def _cache(policy: Policy, pending: deque[list[_Row]], settings: SamplingSettings, batch_rows: int) -> Cache:
    if not sharing_is_exact(policy):
        return PlainCache(policy, batch_rows)
    sizes = [len(group) for group in pending]
    rows = min(batch_rows, sum(sizes))
    at_once = min(len(pending), 2 * -(-rows // max(sizes)))
    longest = max(len(group[0].prompt_ids) for group in pending)
    return SharedCache(policy, rows, at_once, longest, settings.max_tokens - 1)


def _remaining(going: list[bool]) -> list[int]:
    """Which rows go on, in an order that moves few: the last ones take the places of those that ended."""
    count = sum(going)
    late = [i for i in range(count, len(going)) if going[i]]
    return [i if going[i] else late.pop() for i in range(count)]


def _choose(logits: Tensor, rows: list[_Row], settings: SamplingSettings) -> Tensor:
    """Append one token to each row, and return their ids [rows]: the inverse of the cumulative distribution at u."""
    if settings.temperature == 0:
        _check_finite(logits.amax(-1))
        ids = logits.argmax(-1)
        logp = torch.zeros(len(ids))  # the greedy choice has probability 1
    else:
        u = torch.tensor([row.uniforms[len(row.ids)] for row in rows], dtype=torch.float64, device=logits.device)
        pieces = [_drawn(x, v, settings) for x, v in zip(logits.split(_CACHED), u.split(_CACHED), strict=True)]
        ids, logp = (torch.cat(column) for column in zip(*pieces, strict=True))
    for row, token, value in zip(rows, ids.tolist(), logp.tolist(), strict=True):
        row.ids.append(token)
        row.logp.append(value)
    return ids


def _drawn(logits: Tensor, u: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """([M] ids, [M] log-probabilities). The logits are used up."""
    if settings.filtered:
        weights = measured_log_softmax(logits, settings)
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

    An id of weight 0 is never taken. Sums of stretches come first, and only one stretch is then gone through: the
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


def _finish(policy: Policy, rows: list[_Row], ends: frozenset[int], settings: SamplingSettings) -> None:
    """Set the finish reason of rows that have just ended: an end token, a stop string, or the budget."""
    for row in rows:
        if row.ids[-1] in ends:
            row.finish = "eos"
        elif settings.stop and any(text in policy.decode(row.ids) for text in settings.stop):
            row.finish = "stop"
        elif len(row.ids) == settings.max_tokens:
            row.finish = "length"


def _rollout(policy: Policy, row: _Row, settings: SamplingSettings, measure: Measure) -> Rollout:
    text = policy.decode(row.ids)
    if row.finish == "stop":
        text = text[: min(text.find(stop) for stop in settings.stop if stop in text)]
    assert row.finish is not None
    return Rollout(
        prompt=row.prompt,
        sample=row.sample,
        prompt_ids=row.prompt_ids,
        completion_ids=tuple(row.ids),
        completion=text,
        behavior_logp=LogProbs(torch.tensor(row.logp, dtype=torch.float32), measure),
        finish_reason=row.finish,
    )

"""Sampling: y ~ π_θ(.|x), with everything recorded that training needs.

Prompts are encoded once, whatever the number of completions. Random numbers are keyed by (seed, step, prompt, sample):
one uniform number a token, so what is sampled does not depend on batching, order or resumption (up to the rounding of
matrix products, which a different batch shape can change in the last digits).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from lossmith.errors import PolicyError
from lossmith.policy.compiled import uncompiled
from lossmith.policy.distribution import SamplingSettings
from lossmith.policy.load import Policy
from lossmith.policy.log_probs import distribution_of
from lossmith.policy.packed import packed_weights
from lossmith.policy.trial import sharing_is_exact
from lossmith.policy.writing import OpenCompletion, make_cache, write
from lossmith.prompts import Prompt
from lossmith.rollouts import Distribution, LogProbs, Rollout

__all__ = ["as_rollout", "check_samples", "encode_within", "holds_stop", "key_of", "sample", "uniforms"]


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    n: int,
    settings: SamplingSettings,
    *,
    seed: int,
    step: int = 0,
    batch_rows: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
    on_group: Callable[[list[Rollout]], None] | None = None,
) -> list[Rollout]:
    """n completions of each prompt, prompt by prompt.

    step: of a run; each draws other completions. batch_rows: completions that are decoded side by side.
    on_progress(done, of) is called when some have ended, on_group when all completions of a prompt have, while those
    of other prompts are still being written.
    PolicyError: n copies of a greedy completion, or a prompt too long for the model's context.
    """
    check_samples(n, settings)
    encoded = [encode_within(policy, prompt, settings) for prompt in prompts]
    distinct = list({prompt.id: p for p, prompt in enumerate(prompts)}.values())
    order = sorted(distinct, key=lambda p: len(encoded[p]))  # prompts of like length side by side
    pending = deque(
        [
            OpenCompletion(prompts[p], encoded[p], k, uniforms(seed, step, prompts[p].key, k, settings))
            for k in range(start, min(start + batch_rows, n))
        ]
        for p in order
        for start in range(0, n, batch_rows)
    )
    total = sum(map(len, pending))
    distribution = distribution_of(policy, settings)
    written: dict[str, list[Rollout]] = {prompt.id: [] for prompt in prompts}
    done = 0
    cache = make_cache(policy, pending, settings, batch_rows, sharing_is_exact(policy))
    finish = partial(_finish, policy, policy.eos_ids, settings)
    with uncompiled(), policy.computing(), packed_weights(policy):
        for ended in write(policy, cache, pending, settings, finish):
            done += len(ended)
            for row in ended:
                group = written[row.prompt.id]
                group.append(as_rollout(policy, row, settings, distribution))
                if len(group) == n:
                    group.sort(key=lambda r: r.sample)
                    if on_group is not None:
                        on_group(group)
            if on_progress is not None:
                on_progress(done, total)
    return [rollout for prompt in prompts for rollout in written[prompt.id]]


def check_samples(n: int, settings: SamplingSettings) -> None:
    """PolicyError where n completions of a prompt cannot be sampled, would be copies of one, or noise."""
    if n < 1:
        raise PolicyError(f"n = {n}, but at least one completion a prompt is needed.")
    if settings.greedy and n > 1:
        raise PolicyError(f"{settings.greedy} with n = {n} would give {n} copies of one completion.")
    if settings.noise:
        raise PolicyError(f"{settings.noise} would give noise: every token is then about as likely as any other.")


def uniforms(seed: int, step: int, prompt_key: str, sample: int, settings: SamplingSettings) -> np.ndarray:
    """[max_tokens] numbers in [0, 1), a function of their key alone (Philox, a counter-based generator)."""
    key = key_of(seed, step, prompt_key, sample)
    return np.random.Generator(np.random.Philox(key=key)).random(settings.max_tokens)


def key_of(seed: int, step: int, prompt_key: str, sample: int) -> int:
    """128 bits that are one completion's own: where all its random numbers come from."""
    text = f"{seed}/{step}/{prompt_key}/{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def encode_within(policy: Policy, prompt: Prompt, settings: SamplingSettings) -> tuple[int, ...]:
    """The prompt's ids. PolicyError: with max_tokens they exceed the model's context."""
    ids = policy.encode(prompt)
    if len(ids) + settings.max_tokens > policy.context_length:
        raise PolicyError(
            f"{prompt.source}: the prompt's {len(ids)} tokens and max_tokens = {settings.max_tokens} exceed the "
            f"model's context of {policy.context_length}."
        )
    return ids


def _finish(policy: Policy, ends: frozenset[int], settings: SamplingSettings, row: OpenCompletion) -> None:
    """Set the finish reason of a row that has just ended: an end token, a stop string, or the budget."""
    if row.ids[-1] in ends:
        row.finish = "eos"
    elif settings.stop and holds_stop(policy, row, settings.stop):
        row.finish = "stop"
    elif len(row.ids) == settings.max_tokens:
        row.finish = "length"


def holds_stop(policy: Policy, row: OpenCompletion, stop: tuple[str, ...]) -> bool:
    """Whether the last token completes a stop string, special tokens spelled out. Every token is a byte or more."""
    far = max(len(text.encode("utf-8", "replace")) for text in stop) + 1
    before, last = [*row.prompt_ids, *row.ids[:-far]], row.ids[-far:]
    text = policy.decode(last, before, "all")
    return any(end in text for end in stop)


def as_rollout(policy: Policy, row: OpenCompletion, settings: SamplingSettings, distribution: Distribution) -> Rollout:
    """A completion that has ended, with its text: up to the stop string, where one ended it."""
    text = policy.decode(row.ids, row.prompt_ids)
    if row.finish == "stop":
        whole = policy.decode(row.ids, row.prompt_ids, "all")
        at = min(place for stop in settings.stop if (place := whole.find(stop)) >= 0)
        if text.startswith(whole[:at]):
            text = whole[:at]
        else:  # special tokens before it are not shown
            shown = [k for k in range(len(row.ids)) if len(policy.decode(row.ids[:k], row.prompt_ids, "all")) <= at]
            text = policy.decode(row.ids[: shown[-1]], row.prompt_ids)
    assert row.finish is not None
    return Rollout(
        prompt=row.prompt,
        sample=row.sample,
        prompt_ids=row.prompt_ids,
        completion_ids=tuple(row.ids),
        completion=text,
        behavior_logp=LogProbs(torch.tensor(row.logp, dtype=torch.float32), distribution),
        finish_reason=row.finish,
    )

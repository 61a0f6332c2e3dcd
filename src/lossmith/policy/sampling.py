"""Sampling: y ~ π_θ(.|x), with everything recorded that training needs.

Prompts are encoded once, whatever the number of completions. Random numbers are keyed by (seed, step, prompt, sample):
one uniform number a token, so what is sampled does not depend on batching, order or resumption (up to the rounding of
matrix products, which a different batch shape can change in the last digits).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossmith.errors import PolicyError
from lossmith.policy.forward import encode_prompts, select_rows, sharing_is_exact
from lossmith.policy.load import Policy
from lossmith.policy.log_probs import measure_of
from lossmith.policy.measure import SamplingSettings, measured_log_softmax
from lossmith.prompts import Prompt
from lossmith.rollouts import FinishReason, LogProbs, Measure, Rollout

__all__ = ["check_samples", "sample", "uniforms"]


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
) -> list[Rollout]:
    """n completions of each prompt, prompt by prompt.

    batch_rows: completions that are decoded side by side. on_progress(done, of) is called after each batch.
    PolicyError: n copies of a greedy completion, or a prompt too long for the model's context.
    """
    check_samples(n, settings)
    encoded = [_encoded(policy, prompt, settings) for prompt in prompts]
    done: dict[tuple[int, int], Rollout] = {}
    for batch in _batches(encoded, n, batch_rows, sharing_is_exact(policy.model)):
        rows = [_Row(prompts[p], encoded[p], k, uniforms(seed, step, prompts[p].id, k, settings)) for p, k in batch]
        _decode(policy, rows, settings)
        measure = measure_of(policy, settings)
        done |= {key: _rollout(policy, row, settings, measure) for key, row in zip(batch, rows, strict=True)}
        if on_progress is not None:
            on_progress(len(done), len(prompts) * n)
    return [done[p, k] for p in range(len(prompts)) for k in range(n)]


def check_samples(n: int, settings: SamplingSettings) -> None:
    """PolicyError where n completions of a prompt cannot be had, or would be copies of one."""
    if n < 1:
        raise PolicyError(f"n = {n}, but at least one completion a prompt is needed.")
    if settings.temperature == 0 and n > 1:
        raise PolicyError(f"temperature = 0 with n = {n} would give {n} copies of one completion.")


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


def _batches(encoded: list[tuple[int, ...]], n: int, size: int, padding: bool) -> list[list[tuple[int, int]]]:
    """(prompt, sample) pairs in batches, prompts of like length together. Without `padding`, of equal length only."""
    order = sorted(range(len(encoded)), key=lambda p: len(encoded[p]))
    batches: list[list[tuple[int, int]]] = []
    for pair in ((p, k) for p in order for k in range(n)):
        fits = batches and len(batches[-1]) < size
        if fits and not padding:
            fits = len(encoded[batches[-1][0][0]]) == len(encoded[pair[0]])
        if fits:
            batches[-1].append(pair)
        else:
            batches.append([pair])
    return batches


@torch.no_grad()
def _decode(policy: Policy, rows: list[_Row], settings: SamplingSettings) -> None:
    """Fill in ids, log-probabilities and finish reasons. Finished rows leave the batch."""
    prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
    number = {ids: i for i, ids in enumerate(prompts)}
    with policy.autocast():
        cache, prompt_mask, last = encode_prompts(policy, prompts, grad=False)
        owner = torch.tensor([number[row.prompt_ids] for row in rows], device=policy.device)
        cache, mask, hidden = select_rows(cache, owner), prompt_mask[owner], last[owner]
        position = mask.sum(1)
        active, ends = list(rows), policy.eos_ids
        for t in range(settings.max_tokens):
            chosen = _choose(policy.logits(hidden), active, t, settings)
            _finish(policy, active, ends, settings)
            going = [i for i, row in enumerate(active) if row.finish is None]
            if not going:
                return
            if len(going) < len(active):
                keep = torch.tensor(going, device=policy.device)
                active = [active[i] for i in going]
                cache, mask, position, chosen = select_rows(cache, keep), mask[keep], position[keep], chosen[keep]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = _step(policy, chosen, mask, position, cache)
            cache, hidden, position = out.past_key_values, out.last_hidden_state[:, -1], position + 1


def _step(policy: Policy, chosen: Tensor, mask: Tensor, position: Tensor, cache: Any) -> Any:
    return policy.model.base_model(
        input_ids=chosen[:, None],
        attention_mask=mask.long(),
        position_ids=position[:, None],
        past_key_values=cache,
        use_cache=True,
    )


def _choose(logits: Tensor, rows: list[_Row], t: int, settings: SamplingSettings) -> Tensor:
    """Append one token to each row, and return their ids [rows]: the inverse of the cumulative distribution at u."""
    if not torch.isfinite(logits.amax(-1)).all():  # the largest of a row with a NaN is NaN
        raise PolicyError("the model's logits are not finite: its weights are damaged, or training has diverged.")
    if settings.temperature == 0:
        ids = logits.argmax(-1)
        logp = torch.zeros(len(ids))  # the greedy choice has probability 1
    else:
        logps = measured_log_softmax(logits, settings)
        cumulative = logps.double().exp().cumsum(-1)
        u = torch.tensor([row.uniforms[t] for row in rows], dtype=torch.float64, device=logits.device)[:, None]
        # right=True: the first id whose cumulative probability exceeds u, so never one with probability 0
        ids = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
        logp = logps.gather(1, ids[:, None])[:, 0]
    for row, token, value in zip(rows, ids.tolist(), logp.tolist(), strict=True):
        row.ids.append(token)
        row.logp.append(value)
    return ids


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

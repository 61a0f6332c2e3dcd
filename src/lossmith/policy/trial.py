"""A trial of every model at its first use: its later uses are done once, small, and compared with transformers.

A few completions are written through the cache that sampling uses (prompts of several lengths, rows that end early and
make room for others), and their log-probabilities are computed as the learner computes them. Both must agree for each
token with the model's plain forward pass: one row at a time, no cache, no padding.
"""

from __future__ import annotations

import logging
from collections import deque
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lossmith.errors import PolicyError
from lossmith.policy.compiled import uncompiled
from lossmith.policy.distribution import SamplingSettings
from lossmith.policy.forward import hidden_states
from lossmith.policy.load import Policy
from lossmith.policy.writing import OpenCompletion, make_cache, write
from lossmith.prompts import Prompt
from lossmith.rollouts import Distribution, LogProbs, Rollout

__all__ = ["FOREIGN", "attends_fully", "sharing_is_exact"]

# What a model's code may raise when it is used in a way that its author did not intend.
FOREIGN = (
    PolicyError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    RuntimeError,
    AssertionError,
    ArithmeticError,
    ImportError,
)
_SETTINGS = SamplingSettings(max_tokens=4)
_PROMPTS, _COPIES, _SIDE_BY_SIDE = (3, 2, 4), 2, 4  # lengths; the third prompt waits until two rows have ended
_ENDS_AT = (1, 3, 2, 4, 2, 2)  # tokens of each completion: with their prompts they make rows of two lengths only
_RELATIVE, _ROUNDING = 1e-3, 5e-5  # allowed differences: of the spread of a row's logits, and of float32 sums


def sharing_is_exact(policy: Policy) -> bool:
    """Whether completions may share their prompt, tested once. False: transformers' own cache and padded rows.

    PolicyError: neither gives what the model's plain forward pass does.
    """
    if policy.shares is None:
        # rounding by autocast would hide what the trial looks for; compiling for it would take longer than it
        with torch.autocast(policy.device.type, enabled=False), uncompiled(), torch.no_grad():
            policy.shares = _try_sharing(policy)
    return policy.shares


def _try_sharing(policy: Policy) -> bool:
    if attends_fully(policy) and not _fault(policy, shared=True):
        return True
    fault = _fault(policy, shared=False)
    name = type(policy.model).__name__
    if fault:
        raise PolicyError(
            f"{name} cannot be sampled and trained exactly here: {_head_fault(policy) or fault}. Models that attend in "
            "every layer, to everything before a token, are supported."
        )
    _warn_once(name)
    return False


@cache
def _warn_once(name: str) -> None:
    logging.getLogger("lossmith").warning(
        "%s does not attend to a shared prompt as to one of its own: prompts are encoded once per completion, not once "
        "per group.",
        name,
    )


def attends_fully(policy: Policy) -> bool:
    """A window or a state may be longer than the trial: those are known by the configuration."""
    config = policy.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    kinds = kinds or getattr(config, "attention_layers", None)  # GPT-Neo's name for them
    if kinds and any(kind not in ("full_attention", "global") for kind in kinds):
        return False
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return not sliding and not getattr(policy.model, "_is_stateful", False)


def _fault(policy: Policy, shared: bool) -> str:
    """What differs from the plain forward pass, or "" """
    try:
        rollouts = _sample_small(policy, shared)
    except FOREIGN as error:
        return f"completions cannot be continued from cached keys and values ({_short(error)})"
    try:
        plain, spread = _plain(policy, rollouts)
    except FOREIGN as error:
        return f"its plain forward pass fails ({_short(error)})"
    sampled = torch.cat([r.behavior_logp.values for r in rollouts])
    if not _within(sampled, plain, spread):
        off = float((sampled - plain).abs().max())
        return f"what is sampled from cached keys and values is off by up to {off:.3g} nats a token"
    try:
        hidden = hidden_states(policy, rollouts, "shared" if shared else "right")
    except FOREIGN as error:
        return f"several completions cannot be measured together ({_short(error)})"
    measured = _chosen(policy.logits(hidden), [i for r in rollouts for i in r.completion_ids])
    if not _within(measured, plain, spread):
        off = float((measured - plain).abs().max())
        return f"log-probabilities of several completions together are off by up to {off:.3g} nats a token"
    return ""


def _head_fault(policy: Policy) -> str:
    """Whether the head alone explains it: log-probabilities are computed from hidden states."""
    ids = torch.tensor([_made_up(policy, 4, 0)], device=policy.device)
    try:
        own = policy.model(input_ids=ids, use_cache=False).logits.float()
        ours = policy.logits(policy.model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        off = float((ours - own).abs().max())
    except FOREIGN as error:
        return f"it does not compute logits from token ids alone ({_short(error)})"
    if not bool(own.isfinite().all()):
        return "its logits are not finite, so its weights are damaged"
    if off <= _RELATIVE * float(own.std()) + _ROUNDING:
        return ""
    return f"its head applied to its hidden states differs from its own logits by up to {off:.3g}"


def _made_up(policy: Policy, length: int, number: int) -> tuple[int, ...]:
    vocabulary = policy.model.get_input_embeddings().weight.shape[0]
    return tuple((17 * (i + 5 * number) + 5) % vocabulary for i in range(length))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _sample_small(policy: Policy, shared: bool) -> list[Rollout]:
    """Completions of made-up prompts, through the cache that sampling uses."""
    uniforms = np.random.default_rng(0).random((len(_ENDS_AT), _SETTINGS.max_tokens))
    groups: deque[list[OpenCompletion]] = deque()
    for p, length in enumerate(_PROMPTS):
        ids, places = _made_up(policy, length, p), range(p * _COPIES, (p + 1) * _COPIES)
        groups.append([OpenCompletion(Prompt("trial"), ids, i, uniforms[i]) for i in places])

    def finish(row: OpenCompletion) -> None:
        if len(row.ids) == _ENDS_AT[row.sample]:
            row.finish = "length"

    store = make_cache(policy, groups, _SETTINGS, _SIDE_BY_SIDE, shared)
    rows = [row for ended in write(policy, store, groups, _SETTINGS, finish) for row in ended]
    rows.sort(key=lambda row: row.sample)
    distribution = Distribution(policy.version)
    return [
        Rollout(
            row.prompt, row.sample, row.prompt_ids, tuple(row.ids), "",
            LogProbs(torch.tensor(row.logp), distribution), "length",
        )
        for row in rows
    ]  # fmt: skip


def _plain(policy: Policy, rollouts: list[Rollout]) -> tuple[Tensor, Tensor]:
    """([M] log-probabilities by the model alone, [M] standard deviations of the logits at each place).

    Rows of one length go through it together, for nothing is padded then.
    """
    rows = [r.prompt_ids + r.completion_ids[:-1] for r in rollouts]
    logits: dict[int, Tensor] = {}
    for length in {len(row) for row in rows}:
        same_length = [i for i, row in enumerate(rows) if len(row) == length]
        ids = torch.tensor([rows[i] for i in same_length], device=policy.device)
        logits |= dict(zip(same_length, policy.model(input_ids=ids, use_cache=False).logits.float(), strict=True))
    after = [logits[i][-len(r.completion_ids) :] for i, r in enumerate(rollouts)]
    logp = torch.cat([_chosen(x, list(r.completion_ids)) for x, r in zip(after, rollouts, strict=True)])
    return logp, torch.cat([x.std(-1) for x in after]).cpu()


def _chosen(logits: Tensor, ids: list[int]) -> Tensor:
    """[M, V] -> [M] log-probabilities of these ids, on the CPU."""
    chosen = torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(ids, device=logits.device)[:, None])
    return chosen[:, 0].cpu()


def _within(ours: Tensor, plain: Tensor, spread: Tensor) -> bool:
    return bool(((ours - plain).abs() <= _RELATIVE * spread + _ROUNDING).all())

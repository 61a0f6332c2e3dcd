"""Log-probabilities of recorded completions under the policy as it is now, with gradient.

The head runs on response positions only, in chunks: no [N, T, V] tensor of logits is ever stored. What is stored for
the backward pass, or computed again in it, is decided in `head` where the head is plain; elsewhere chunks are
recomputed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lossmith.errors import PolicyError
from lossmith.policy.activation_checkpointing import checkpoint_activations
from lossmith.policy.distribution import SamplingSettings, log_softmax_under
from lossmith.policy.forward import Layout, hidden_states
from lossmith.policy.head import chosen_log_probs, head_is_plain
from lossmith.policy.load import Policy
from lossmith.policy.sharded import gathered
from lossmith.policy.trial import sharing_is_exact
from lossmith.rollouts import Distribution, Rollout

__all__ = ["TokenOutputs", "distribution_of", "token_outputs"]


@dataclass(frozen=True, eq=False)
class TokenOutputs:
    """What the model says about N completions of at most T tokens; nats, float32 or wider, 0 at masked positions."""

    logp: Tensor  # [N, T], of each response token, under `distribution`
    mask: Tensor  # [N, T] bool
    distribution: Distribution
    entropy: Tensor | None = None  # [N, T], of the distribution at each position
    full_kl: Tensor | None = None  # [N, T], KL(policy || reference) at each position
    value: Tensor | None = None  # [N, T], the critic's value before each token


def distribution_of(policy: Policy, settings: SamplingSettings) -> Distribution:
    """What the policy's log-probabilities are measured under with these settings."""
    kind = str(policy.compute_dtype).removeprefix("torch.")
    return Distribution(policy.version, settings.temperature, settings.top_p, settings.top_k, kind)


def token_outputs(
    policy: Policy,
    rollouts: Sequence[Rollout],
    settings: SamplingSettings,
    *,
    layout: Layout = "shared",
    want: frozenset[str] = frozenset(),
    reference: Policy | None = None,
    chunk: int = 512,
    activation_checkpointing: bool = False,
) -> TokenOutputs:
    """Log-probabilities of the rollouts' tokens, under the distribution they were sampled from.

    want: any of "entropy", "full_kl" (with `reference`), "value" (with a value head).
    chunk: response positions whose logits [chunk, V] exist at one time.
    activation_checkpointing: store the inputs of layers only, and run the layers again in the backward pass.
    """
    _check_request(policy, rollouts, settings, want, reference)
    if layout in ("shared", "packed") and not sharing_is_exact(policy):
        layout = "right"
    ids = torch.tensor([i for r in rollouts for i in r.completion_ids], device=policy.device)
    head = _Head(policy, reference, settings, want)

    def forward() -> list[Tensor]:
        with checkpoint_activations(policy.model) if activation_checkpointing else contextlib.nullcontext():
            hidden = hidden_states(policy, rollouts, layout)
        ref_hidden = None
        if "full_kl" in want and reference is not None:
            with torch.no_grad():
                ref_hidden = hidden_states(reference, rollouts, layout)
        if head.names == ["logp"] and head_is_plain(policy, settings):
            return [hidden, chosen_log_probs(policy, hidden, ids, settings, chunk)]
        return [hidden, *head.in_chunks(hidden, ids, ref_hidden, chunk)]

    with policy.autocast():
        hidden, *flat = gathered(policy.model, forward)
    lengths = torch.tensor([len(r.completion_ids) for r in rollouts], device=policy.device)
    mask = torch.arange(int(lengths.max()), device=policy.device)[None] < lengths[:, None]
    columns = {name: _unflatten(x, mask) for name, x in zip(head.names, flat, strict=True)}
    if "value" in want and policy.value_head is not None:
        detached = hidden.detach().to(policy.value_head.weight.dtype)
        columns["value"] = _unflatten(policy.value_head(detached)[:, 0], mask)
    return TokenOutputs(mask=mask, distribution=distribution_of(policy, settings), **columns)


class _Head:
    """Hidden states of one chunk -> columns [M] of log-probability, entropy, full KL."""

    def __init__(
        self, policy: Policy, reference: Policy | None, settings: SamplingSettings, want: frozenset[str]
    ) -> None:
        self.policy, self.reference, self.settings = policy, reference, settings
        self.names = ["logp"] + [name for name in ("entropy", "full_kl") if name in want]

    def in_chunks(self, hidden: Tensor, ids: Tensor, ref_hidden: Tensor | None, chunk: int) -> list[Tensor]:
        pieces = [
            self(hidden[i : i + chunk], ids[i : i + chunk], None if ref_hidden is None else ref_hidden[i : i + chunk])
            for i in range(0, len(ids), chunk)
        ]
        return [torch.cat(columns) for columns in zip(*pieces, strict=True)]

    def __call__(self, hidden: Tensor, ids: Tensor, ref_hidden: Tensor | None) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            return checkpoint(self._columns, hidden, ids, ref_hidden, use_reentrant=False)
        return self._columns(hidden, ids, ref_hidden)

    def _columns(self, hidden: Tensor, ids: Tensor, ref_hidden: Tensor | None) -> tuple[Tensor, ...]:
        logps = log_softmax_under(self.policy.logits(hidden), self.settings, keep=ids)
        columns = [logps.gather(1, ids[:, None])[:, 0]]
        if "entropy" in self.names:
            columns.append(-_expectation(logps, logps))
        if ref_hidden is not None and self.reference is not None:
            with torch.no_grad():
                ref_logps = log_softmax_under(self.reference.logits(ref_hidden), self.settings)
            columns.append(_expectation(logps, logps - ref_logps))
        return tuple(columns)


def _expectation(logps: Tensor, x: Tensor) -> Tensor:
    """Σ_v π(v) x(v), [M]; tokens outside the support count 0."""
    return torch.where(logps > -torch.inf, logps.exp() * x, torch.zeros_like(x)).sum(-1)


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """[M] -> [N, T], 0 at masked positions; gradients kept."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def _check_request(
    policy: Policy,
    rollouts: Sequence[Rollout],
    settings: SamplingSettings,
    want: frozenset[str],
    reference: Policy | None,
) -> None:
    if not rollouts:
        raise PolicyError("there are no rollouts to measure.")
    if any(not r.completion_ids for r in rollouts):
        raise PolicyError("a rollout has no response token.")
    if "full_kl" in want and reference is None:
        raise PolicyError("full_kl needs a reference policy.")
    if "full_kl" in want and settings.filtered:
        raise PolicyError("full_kl with top_p or top_k is infinite wherever the two supports differ: turn them off.")
    if "value" in want and policy.value_head is None:
        raise PolicyError("value needs a value head: call policy.add_value_head() first.")

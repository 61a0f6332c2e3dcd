"""Log-probabilities of recorded completions under the policy as it is now, with gradient.

The head runs on response positions only, in chunks: no [N, T, V] tensor of logits is ever stored. What is stored for
the backward pass, or computed again in it, is decided in `head` where the head is plain; elsewhere chunks are
recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lossmith.errors import PolicyError
from lossmith.policy.activation_checkpointing import checkpoint_activations
from lossmith.policy.distribution import SamplingSettings, log_softmax_under
from lossmith.policy.forward import Layout, hidden_states
from lossmith.policy.head import chosen_log_probs, head_is_plain
from lossmith.policy.lean import storing_less
from lossmith.policy.load import Policy
from lossmith.policy.sending import sent
from lossmith.policy.sharded import gathered
from lossmith.policy.teacher import Teacher
from lossmith.policy.trial import sharing_is_exact
from lossmith.rollouts import Distribution, Rollout

__all__ = ["TokenOutputs", "distribution_of", "token_outputs"]

Divergence = Callable[[Tensor, Tensor], Tensor]  # log-probabilities [M, V] of policy and teacher -> [M]
_AT_ONCE = 32 << 20  # bytes of the logits of a chunk whose divergence is computed: a dozen of that size are held


Kept: TypeAlias = list[tuple[int, ...]] | None  # the support at each position, where the sampler said it


@dataclass(frozen=True, eq=False)
class TokenOutputs:
    """What the model says about N completions of at most T tokens; nats, float32 or wider, 0 at masked positions."""

    logp: Tensor  # [N, T], of each response token, under `distribution`
    mask: Tensor  # [N, T] bool
    distribution: Distribution
    entropy: Tensor | None = None  # [N, T], of the distribution at each position
    full_kl: Tensor | None = None  # [N, T], KL(policy || reference) at each position
    divergence: Tensor | None = None  # [N, T], of policy and teacher at each position
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
    teacher: Teacher | None = None,
    divergence: Divergence | None = None,
    chunk: int = 512,
    activation_checkpointing: bool = False,
) -> TokenOutputs:
    """Log-probabilities of the rollouts' tokens, under the distribution they were sampled from.

    want: any of "entropy", "full_kl" (with `reference`), "value" (with a value head), "divergence" (of the policy
    from the `teacher` at each position, as the function `divergence` has it; the teacher is given no gradient).
    chunk: response positions whose logits [chunk, V] exist at one time.
    activation_checkpointing: store the inputs of layers only, and run the layers again in the backward pass.
    """
    _check_request(policy, rollouts, settings, want, reference)
    if "divergence" in want and (teacher is None or divergence is None):
        raise PolicyError("divergence needs a teacher, and the function that is wanted of both.")
    if layout in ("shared", "packed") and not sharing_is_exact(policy):
        layout = "right"
    ids = sent([i for r in rollouts for i in r.completion_ids], policy.device)
    sets = [each for r in rollouts for each in r.kept or ()]
    kept = sets if len(sets) == len(ids) else None
    head = _Head(policy, reference, settings, want, None if teacher is None else teacher.policy, divergence)

    def forward() -> list[Tensor]:
        with checkpoint_activations(policy.model) if activation_checkpointing else storing_less(policy):
            hidden = hidden_states(policy, rollouts, layout)
        ref_hidden = teacher_hidden = None
        if "full_kl" in want and reference is not None:
            with torch.no_grad(), reference.computing():
                ref_hidden = hidden_states(reference, rollouts, layout)
        if "divergence" in want and teacher is not None:
            with torch.no_grad(), teacher.policy.computing():
                shares = sharing_is_exact(teacher.policy)
                teacher_hidden = hidden_states(teacher.policy, teacher.sees(rollouts), layout if shares else "right")
        if head.names == ["logp"] and head_is_plain(policy, settings):
            return [hidden, chosen_log_probs(policy, hidden, ids, settings, chunk)]
        return [hidden, *head.in_chunks(hidden, ids, (ref_hidden, teacher_hidden), chunk, kept)]

    with policy.computing():
        hidden, *flat = gathered(policy.model, forward)
    lengths = [len(r.completion_ids) for r in rollouts]
    mask = torch.arange(max(lengths), device=policy.device)[None] < sent(lengths, policy.device)[:, None]
    columns = {name: _unflatten(x, mask) for name, x in zip(head.names, flat, strict=True)}
    if "value" in want and policy.value_head is not None:
        detached = hidden.detach().to(policy.value_head.weight.dtype)
        columns["value"] = _unflatten(policy.value_head(detached)[:, 0], mask)
    return TokenOutputs(mask=mask, distribution=distribution_of(policy, settings), **columns)


class _Head:
    """Hidden states of one chunk -> columns [M] of log-probability, entropy, full KL, divergence from the teacher."""

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        settings: SamplingSettings,
        want: frozenset[str],
        teacher: Policy | None = None,
        divergence: Divergence | None = None,
    ) -> None:
        self.policy, self.reference, self.settings = policy, reference, settings
        self.teacher, self.divergence = teacher, divergence
        self.names = ["logp"] + [name for name in ("entropy", "full_kl", "divergence") if name in want]

    def in_chunks(
        self, hidden: Tensor, ids: Tensor, others: tuple[Tensor | None, ...], chunk: int, kept: Kept = None
    ) -> list[Tensor]:
        """others: hidden states of the reference and of the teacher, where they are wanted."""
        if "divergence" in self.names:
            chunk = min(chunk, max(1, _AT_ONCE // (4 * self.policy.model.get_output_embeddings().weight.shape[0])))
        pieces = []
        for i in range(0, len(ids), chunk):
            rows = slice(i, i + chunk)
            ref_hidden, teacher_hidden = (None if x is None else x[rows] for x in others)
            sets = None if kept is None else kept[rows]
            pieces.append(self(hidden[rows], ids[rows], ref_hidden, teacher_hidden, sets))
        return [torch.cat(columns) for columns in zip(*pieces, strict=True)]

    def __call__(
        self, hidden: Tensor, ids: Tensor, ref_hidden: Tensor | None, teacher_hidden: Tensor | None, kept: Kept
    ) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            return checkpoint(self._columns, hidden, ids, ref_hidden, teacher_hidden, kept, use_reentrant=False)
        return self._columns(hidden, ids, ref_hidden, teacher_hidden, kept)

    def _columns(
        self, hidden: Tensor, ids: Tensor, ref_hidden: Tensor | None, teacher_hidden: Tensor | None, kept: Kept
    ) -> tuple[Tensor, ...]:
        logps = log_softmax_under(self.policy.logits(hidden), self.settings, keep=ids, kept=kept)
        columns = [logps.gather(1, ids[:, None])[:, 0]]
        if "entropy" in self.names:
            columns.append(-_expectation(logps, logps))
        if ref_hidden is not None and self.reference is not None:
            with torch.no_grad(), self.reference.computing():
                ref_logps = log_softmax_under(self.reference.logits(ref_hidden), self.settings)
            columns.append(_expectation(logps, logps - ref_logps))
        if teacher_hidden is not None and self.teacher is not None and self.divergence is not None:
            with torch.no_grad(), self.teacher.computing():
                # numbers of its vocabulary beyond the policy's are padding, no token
                logits = self.teacher.logits(teacher_hidden)[:, : logps.shape[1]]
                teacher_logps = log_softmax_under(logits, self.settings)
            columns.append(self.divergence(logps, teacher_logps))
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
    if "divergence" in want and settings.filtered:
        raise PolicyError("a divergence over the vocabulary with top_p or top_k is infinite: turn them off.")
    if "value" in want and policy.value_head is None:
        raise PolicyError("value needs a value head: call policy.add_value_head() first.")

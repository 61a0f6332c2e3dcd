"""What a loss sees: one record of tensors, checked once, with nothing at masked positions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError, nearest
from lossmith.losses.as_tensor import as_bool, as_numbers, as_whole_numbers

__all__ = ["Batch", "Normalizer"]

# Who fills a field when a loss needs it and it is missing.
PROVIDERS = {
    "logp": "a forward pass of the policy",
    "mask": "the sampler (True on response tokens, the end token included)",
    "old_logp": "a forward pass of the policy at the start of the update",
    "behavior_logp": "the sampler",
    "ref_logp": "a forward pass of the reference policy",
    "full_kl": "a forward pass of the policy and the reference over the full vocabulary",
    "reward": "the scorer",
    "group": "the loop (number the prompts, so that completions of one prompt share a number)",
    "value": "a value head",
    "returns": "you, or the advantage estimator",
    "entropy": "a forward pass of the policy",
    "truncated": "the sampler (finish reason 'length')",
    "advantage": "you (advantage='given' computes none)",
    "baseline": "you (a running average of rewards, say)",
    "reward_greedy": "the scorer, on a greedy completion of each row's prompt",
    "reward_parts": "the scorers, one column each",
    "reference_reward": "the scorer, on completions that the reference policy wrote for each row's prompt",
    "sum_prob_sq": "a forward pass of the policy over the full vocabulary",
    "potential": "you (a potential function of the tokens so far)",
    "off_policy": "whoever mixed completions of another policy into the batch",
    "lag": "the sampler (policy versions between sampling and this update)",
    "mismatched_log_ratio": "forward passes of the policy and the reference over each prompt with another's completion",
    "pair_probability": "whoever judged the pairs (`lossmith prefer` reads it from the preferences)",
    "pair_weight": "whoever judged the pairs (`lossmith prefer` reads it from the preferences)",
}
_PER_ROW = {"group", "truncated", "baseline", "reward_greedy", "off_policy", "lag"}  # [N]
_PER_ROW |= {"mismatched_log_ratio", "pair_probability", "pair_weight"}
_EITHER = {"reward", "advantage"}  # [N] or [N, T]
_PER_PART = {"reward_parts", "reference_reward"}  # [N, K]
_SCORES = {"reward", "advantage", "baseline", "reward_greedy", *_PER_PART}  # whole numbers and bool too
_CARRIES_GRADIENT = {"logp", "value", "entropy", "full_kl"}
_BOOL = {"mask", "truncated", "off_policy"}
_WHOLE = {"group", "lag"}  # integers


@dataclass(frozen=True, eq=False)
class Batch:
    """N completions of at most T response tokens. Only `logp`, `value`, `entropy` and `full_kl` carry gradients.

    logp [N, T]           log-probability (nats) of each response token under the policy being trained
    mask [N, T] bool      True on response tokens, the end token included; prompt and padding are False
    old_logp [N, T]       under the policy at the start of this update; None means `logp.detach()` (ratio 1)
    behavior_logp [N, T]  under the distribution really sampled from
    ref_logp [N, T]       under the reference policy (the KL anchor)
    full_kl [N, T]        KL(policy || reference) over the full vocabulary at each position
    reward [N] or [N, T]  score of each completion, or of each token
    group [N] int         the prompt's number
    advantage [N] or [N, T]  given: the estimator and its scale are bypassed
    value, old_value, returns [N, T]  critic's value before each token (now, at the start of the update), its target
    entropy [N, T]        entropy (nats) of the policy at each position
    truncated [N] bool    the token budget ended the completion
    baseline, reward_greedy [N]  what is taken off the reward: any number; the reward of the greedy completion
    reward_parts [N, K], reference_reward [N, K]  K scores of one completion; scores of K completions of the reference
    sum_prob_sq, potential [N, T]  Σ_v p(v)² at each position; potential before each token (for shaping)
    off_policy [N] bool, lag [N] int  written by another policy; policy versions since it was sampled
    mismatched_log_ratio [N]  log π/π_ref (nats) of a completion of another prompt, for KTO's reference point
    pair_probability, pair_weight [N]  of the pairs that the row wins: how likely it is better, what they count

    Where reward is missing and reward_parts is given, the reward is their sum.

    Nested lists are accepted and read as float64, and so are rewards of whole numbers or bool. What stands at masked
    positions never matters. A non-finite value at a valid position is a LossError that names the row and the position.
    """

    logp: Tensor | None = None
    mask: Tensor | None = None
    old_logp: Tensor | None = None
    behavior_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    full_kl: Tensor | None = None
    reward: Tensor | None = None
    group: Tensor | None = None
    advantage: Tensor | None = None
    value: Tensor | None = None
    old_value: Tensor | None = None
    returns: Tensor | None = None
    entropy: Tensor | None = None
    truncated: Tensor | None = None
    baseline: Tensor | None = None
    reward_greedy: Tensor | None = None
    reward_parts: Tensor | None = None
    reference_reward: Tensor | None = None
    sum_prob_sq: Tensor | None = None
    potential: Tensor | None = None
    off_policy: Tensor | None = None
    lag: Tensor | None = None
    mismatched_log_ratio: Tensor | None = None
    pair_probability: Tensor | None = None
    pair_weight: Tensor | None = None

    def __new__(cls, *given: Any, **named: Any) -> Batch:
        """LossError: a field that there is none of."""
        fields = [f.name for f in dataclasses.fields(cls)]
        for name in named:
            if name not in fields:
                raise LossError(f"Batch has no field {name!r}.{nearest(name, fields)}")
            if name in fields[: len(given)]:
                raise LossError(f"Batch.{name} is given twice.")
        if len(given) > len(fields):
            raise LossError(f"Batch has {len(fields)} fields, not {len(given)}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.mask is None:
            raise LossError(f"Batch.mask is missing; it comes from {PROVIDERS['mask']}.")
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if given is not None:
                object.__setattr__(self, field.name, _as_tensor(field.name, given))
        self._check_shapes()
        for field in dataclasses.fields(self):
            if field.name not in _BOOL | _WHOLE and getattr(self, field.name) is not None:
                self._clean(field.name)
        if self.reward is None and self.reward_parts is not None:
            object.__setattr__(self, "reward", self.reward_parts.sum(1))
        self._check_ranges()

    def _check_shapes(self) -> None:
        assert self.mask is not None
        if self.mask.ndim != 2:
            raise LossError(f"Batch.mask must be [N, T], not of shape {list(self.mask.shape)}.")
        n, t = self.mask.shape
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            if tensor is None:
                continue
            if tensor.device != self.mask.device:
                raise LossError(
                    f"Batch.{field.name} is on {tensor.device}, but mask is on {self.mask.device}. Move it there first."
                )
            allowed: list[tuple[Any, ...]] = [(n,)] if field.name in _PER_ROW | _EITHER else []
            allowed += [] if field.name in _PER_ROW | _PER_PART else [(n, t)]
            if field.name in _PER_PART:
                allowed = [(n, tensor.shape[1] if tensor.ndim == 2 and tensor.shape[1] else "K")]
            if tuple(tensor.shape) not in allowed:
                wanted = " or ".join(f"[{', '.join(map(str, a))}]" for a in allowed)
                raise LossError(
                    f"Batch.{field.name} has shape {list(tensor.shape)}, but mask [N, T] asks for {wanted}."
                )

    def _clean(self, name: str) -> None:
        """Select valid positions before any arithmetic: 0 x NaN is NaN, where(mask, NaN, 0) is 0, in gradients too."""
        tensor = getattr(self, name)
        assert self.mask is not None
        mask = self.mask.any(1, keepdim=tensor.ndim == 2) if name in _PER_PART or tensor.ndim == 1 else self.mask
        if tensor.dtype not in (torch.float32, torch.float64):
            raise LossError(
                f"Batch.{name} is {tensor.dtype}; losses are computed in float32 or wider. Call .float() on it first."
            )
        clean = torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
        if bool(torch.isfinite(clean.detach().sum())):  # one pass; only a non-finite sum needs a closer look
            object.__setattr__(self, name, clean)
            return
        bad = ~torch.isfinite(clean.detach())
        if bool(bad.any()):
            where = bad.nonzero()[0].tolist()
            at = f"row {where[0]}" + (f", token {where[1]}" if len(where) > 1 else "")
            raise LossError(
                f"Batch.{name} is {float(tensor.detach()[tuple(where)])} at {at}, a valid position "
                f"({int(bad.sum())} such values). Drop that rollout or mask it; a loss over it would be meaningless."
            )
        object.__setattr__(self, name, clean)

    def _check_ranges(self) -> None:
        for name, top in (("pair_probability", 1.0), ("pair_weight", torch.inf)):
            x = getattr(self, name)
            if x is not None and not bool(((x >= 0) & (x <= top)).all()):
                row = int(((x < 0) | (x > top)).nonzero()[0])
                raise LossError(f"Batch.{name} is {float(x[row]):g} at row {row}, but must lie between 0 and {top:g}.")

    def require(self, name: str, owner: str) -> Tensor:
        """The field, or a LossError that says which loss needs it and who provides it."""
        tensor = getattr(self, name)
        if tensor is None:
            raise LossError(f"{owner} needs Batch.{name}, which is missing; it comes from {PROVIDERS[name]}.")
        return tensor

    @property
    def given(self) -> dict[str, Tensor]:
        """The fields that a forward pass of the policy does not change."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in _CARRIES_GRADIENT]
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def rows(self, index: Tensor | slice) -> Batch:
        """The batch with these rows only, gradients kept."""
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{name: None if x is None else x[index] for name, x in kept.items()})

    def replace(self, **changes: Any) -> Batch:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    # -- what pieces read -------------------------------------------------------------------------------------------

    @property
    def valid(self) -> Tensor:
        """mask, known to be there."""
        assert self.mask is not None
        return self.mask

    @cached_property
    def lengths(self) -> Tensor:
        """[N] valid tokens of each completion."""
        return self.valid.sum(1)

    @cached_property
    def live(self) -> Tensor:
        """[N] bool: the completion has a valid token."""
        return self.lengths > 0

    @cached_property
    def tokens(self) -> int:
        """Valid tokens of all completions."""
        return int(self.lengths.sum())

    @cached_property
    def dtype(self) -> torch.dtype:
        """The widest floating type among the fields."""
        kinds = [x.dtype for f in dataclasses.fields(self) if (x := getattr(self, f.name)) is not None]
        wide = any(kind == torch.float64 for kind in kinds)
        return torch.float64 if wide else torch.float32

    def old(self, owner: str) -> Tensor:
        """old_logp detached, or logp detached: a missing old policy is the current one."""
        return (self.old_logp if self.old_logp is not None else self.require("logp", owner)).detach()


@dataclass(frozen=True)
class Normalizer:
    """How many things the loss of one update averages over, counted over the whole batch and all ranks.

    Every micro-batch and rank divides by these same numbers, so their losses and gradients add up to the whole.
    """

    tokens: int
    sequences: int
    groups: int
    units: float | None = None  # pairs (or their weights), groups or rows that a completion loss averages over

    @classmethod
    def of(cls, mask: Tensor, group: Tensor | None = None) -> Normalizer:
        """Count valid tokens, completions with a valid token, and prompts with one. mask [N, T], group [N]."""
        lengths = mask.sum(1)
        rows = lengths > 0  # several times as fast as mask.any(1)
        sequences = int(rows.sum())
        groups = int(group[rows].unique().numel()) if group is not None else sequences
        return cls(tokens=int(lengths.sum()), sequences=sequences, groups=groups)

    def __add__(self, other: Normalizer) -> Normalizer:
        """The normaliser of two ranks together (a prompt's completions must stay on one rank)."""
        units = None if self.units is None or other.units is None else self.units + other.units
        return Normalizer(
            self.tokens + other.tokens, self.sequences + other.sequences, self.groups + other.groups, units
        )


def _as_tensor(name: str, given: Any) -> Tensor:
    if name in _BOOL:
        return as_bool(name, given).detach()
    if name in _WHOLE:
        return as_whole_numbers(name, given).detach()
    found = as_numbers(name, given, score=name in _SCORES)
    return found if name in _CARRIES_GRADIENT else found.detach()

"""What a loss sees: one record of tensors, checked once, with nothing at masked positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError, nearest
from lossmith.losses.as_tensor import as_bool, as_numbers, as_whole_numbers

__all__ = ["FIELDS", "Batch", "Field", "Normalizer"]


@dataclass(frozen=True)
class Field:
    """What is true of a field of Batch, said where the field stands; whatever lists fields reads it from FIELDS.

    shapes: of N completions, T tokens, K scores, V tokens of the vocabulary; provider: who fills it in when a loss
    needs it and it is missing; trained: `lossmith train` does. kind: "logp" (nats), "number" (any), "amount" (at least
    0), "share" (0 to 1), "score" (whole numbers and bool are accepted), "flag" (bool) or "whole" (integers). gradient:
    it may carry one.
    """

    shapes: tuple[str, ...]
    provider: str
    kind: str = "number"
    trained: bool = False
    gradient: bool = False


def _field(shapes: str, provider: str, kind: str = "number", *, trained: bool = False, gradient: bool = False) -> Any:
    about = Field(tuple(shapes.split()), provider, kind, trained, gradient)
    return dataclasses.field(default=None, metadata={"about": about})


_POLICY, _BOTH, _YOU = "a forward pass of the policy", "a forward pass of the policy and the reference", "you"
_TEACHER = "a forward pass of the teacher"
_JUDGES = "whoever judged the pairs (`lossmith prefer` reads it from the preferences)"


@dataclass(frozen=True, eq=False)
class Batch:
    """N completions of at most T response tokens. Only `logp`, `value`, `entropy`, `full_kl`, `vocab_logp` and
    `divergence` carry gradients.

    logp [N, T]           log-probability (nats) of each response token under the policy being trained
    mask [N, T] bool      True on response tokens, the end token included; prompt and padding are False
    old_logp [N, T]       under the policy at the start of this update; None means `logp.detach()` (ratio 1)
    behavior_logp [N, T]  under the distribution really sampled from
    ref_logp [N, T]       under the reference policy (the KL anchor)
    full_kl [N, T]        KL(policy || reference) over the full vocabulary at each position
    teacher_logp [N, T]   of each response token under a teacher: another policy, or this one that was told more
    vocab_logp, teacher_vocab_logp [N, T, V]  of every token of the vocabulary at each position, under the policy and
                          the teacher; or of the same V tokens of it, a top-k say
    divergence [N, T]     the loss's own divergence of policy and teacher at each position, where whoever has the models
                          computed it in chunks; the two fields of V tokens are not needed then
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

    Where reward is missing and reward_parts is given, the reward is their sum. A completion whose tokens are all masked
    is none, and its reward is 0 here; `masked_reward` remembers what it was, for losses that count it all the same.

    Nested lists are accepted and read as float64, and so are rewards of whole numbers or bool; 1 and 0 are true and
    false. What stands at masked
    positions never matters. A non-finite value at a valid position is a LossError that names the row and the position.
    """

    logp: Tensor | None = _field("NT", _POLICY, "logp", gradient=True)
    mask: Tensor | None = _field("NT", "the sampler (True on response tokens, the end token included)", "flag")
    old_logp: Tensor | None = _field("NT", f"{_POLICY} at the start of the update", "logp", trained=True)
    behavior_logp: Tensor | None = _field("NT", "the sampler", "logp", trained=True)
    ref_logp: Tensor | None = _field("NT", "a forward pass of the reference policy", "logp", trained=True)
    full_kl: Tensor | None = _field("NT", f"{_BOTH} over the full vocabulary", "amount", trained=True, gradient=True)
    teacher_logp: Tensor | None = _field("NT", _TEACHER, "logp", trained=True)
    vocab_logp: Tensor | None = _field("NTV", f"{_POLICY} over the vocabulary", "logp", trained=True, gradient=True)
    teacher_vocab_logp: Tensor | None = _field("NTV", f"{_TEACHER} over the vocabulary", "logp", trained=True)
    divergence: Tensor | None = _field(
        "NT", f"{_POLICY} and the teacher, over the vocabulary in chunks", trained=True, gradient=True
    )
    reward: Tensor | None = _field("N NT", "the scorer", "score", trained=True)
    group: Tensor | None = _field(
        "N", "the loop (number the prompts, so that completions of one prompt share a number)", "whole", trained=True
    )
    advantage: Tensor | None = _field("N NT", f"{_YOU} (advantage='given' computes none)", "score")
    value: Tensor | None = _field("NT", "a value head", trained=True, gradient=True)
    old_value: Tensor | None = _field("NT", "a value head at the start of the update", trained=True)
    returns: Tensor | None = _field("NT", f"{_YOU}, or the advantage estimator")
    entropy: Tensor | None = _field("NT", _POLICY, "amount", trained=True, gradient=True)
    truncated: Tensor | None = _field("N", "the sampler (finish reason 'length')", "flag", trained=True)
    baseline: Tensor | None = _field("N", f"{_YOU} (a running average of rewards, say)", "score")
    reward_greedy: Tensor | None = _field("N", "the scorer, on a greedy completion of each row's prompt", "score")
    reward_parts: Tensor | None = _field("NK", "the scorers, one column each", "score")
    reference_reward: Tensor | None = _field(
        "NK", "the scorer, on completions that the reference policy wrote for each row's prompt", "score"
    )
    sum_prob_sq: Tensor | None = _field("NT", f"{_POLICY} over the full vocabulary", "share")
    potential: Tensor | None = _field("NT", f"{_YOU} (a potential function of the tokens so far)")
    off_policy: Tensor | None = _field("N", "whoever mixed completions of another policy into the batch", "flag")
    lag: Tensor | None = _field(
        "N", "the sampler (policy versions between sampling and this update)", "whole", trained=True
    )
    mismatched_log_ratio: Tensor | None = _field(
        "N", "forward passes of the policy and the reference over each prompt with another's completion", trained=True
    )
    pair_probability: Tensor | None = _field("N", _JUDGES, "share")
    pair_weight: Tensor | None = _field("N", _JUDGES, "amount")

    def __new__(cls, *given: Any, **named: Any) -> Batch:
        """LossError: a field that there is none of."""
        fields = list(FIELDS)
        for name in named:
            if name not in fields:
                raise LossError(f"Batch has no field {name!r}.{nearest(name, fields)}")
            if name in fields[: len(given)]:
                raise LossError(f"Batch.{name} is given twice.")
        if len(given) > len(fields):
            raise LossError(f"Batch has {len(fields)} fields, not {len(given)}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_masked_reward", None)
        if self.mask is None:
            raise LossError(f"Batch.mask is missing; it comes from {FIELDS['mask'].provider}.")
        self._check(FIELDS)
        if self.reward is None and self.reward_parts is not None:
            object.__setattr__(self, "reward", self.reward_parts.sum(1))

    def _check(self, names: Collection[str]) -> None:
        """Read and check these fields; the others are known to be right."""
        names = [name for name in names if getattr(self, name) is not None]
        for name in names:
            object.__setattr__(self, name, _as_tensor(name, getattr(self, name)))
        for name in names:
            self._check_shape(name)
        numbers = [name for name in names if FIELDS[name].kind not in ("flag", "whole")]
        for name in numbers:
            self._clean(name)
        self._check_finite(numbers)
        self._check_ranges(names)

    def _check_shape(self, name: str) -> None:
        tensor, mask = getattr(self, name), self.valid
        if mask.ndim != 2:
            raise LossError(f"Batch.mask must be [N, T], not of shape {list(mask.shape)}.")
        if tensor.device != mask.device:
            raise LossError(f"Batch.{name} is on {tensor.device}, but mask is on {mask.device}. Move it there first.")
        size: dict[str, Any] = dict(zip("NT", mask.shape, strict=True))
        size["K"] = tensor.shape[1] if tensor.ndim == 2 and tensor.shape[1] else "K"
        size["V"] = tensor.shape[2] if tensor.ndim == 3 and tensor.shape[2] else "V"
        allowed = [tuple(size[letter] for letter in shape) for shape in FIELDS[name].shapes]
        if tuple(tensor.shape) not in allowed:
            wanted = " or ".join(f"[{', '.join(map(str, a))}]" for a in allowed)
            raise LossError(f"Batch.{name} has shape {list(tensor.shape)}, but mask [N, T] asks for {wanted}.")

    def _clean(self, name: str) -> None:
        """Select valid positions before any arithmetic: 0 x NaN is NaN, where(mask, NaN, 0) is 0, in gradients too."""
        tensor = getattr(self, name)
        per_row = tensor.ndim == 1 or "NK" in FIELDS[name].shapes
        mask = self.live.view(-1, *[1] * (tensor.ndim - 1)) if per_row else self.valid
        mask = mask[..., None] if tensor.ndim == 3 else mask
        if tensor.dtype not in (torch.float32, torch.float64):
            raise LossError(
                f"Batch.{name} is {tensor.dtype}; losses are computed in float32 or wider. Call .float() on it first."
            )
        if name == "reward" and tensor.ndim == 1:
            there = ~mask & torch.isfinite(tensor)
            object.__setattr__(self, "_masked_reward", torch.where(there, tensor, torch.nan))
        clean = torch.where(mask, tensor, 0.0)
        if tensor.is_leaf and tensor.requires_grad:  # batch.logp.grad is then what the tensor that was given gets
            clean.register_hook(lambda grad: torch.where(mask, grad, 0.0))
            clean.retain_grad()
        object.__setattr__(self, name, clean)

    def _check_finite(self, names: Collection[str]) -> None:
        """One question for all fields, since on a GPU each waits for the device: is the sum of all sums finite?"""
        if math.isfinite(sum(getattr(self, name).detach().sum() for name in names)):
            return
        for name in names:  # finite numbers too may have a sum that is not
            clean = getattr(self, name).detach()
            bad = (~torch.isfinite(clean)).nonzero().tolist()
            if bad:
                at = f"row {bad[0][0]}" + (f", token {bad[0][1]}" if clean.ndim > 1 else "")
                at += f", number {bad[0][2]} of its vocabulary" if clean.ndim > 2 else ""
                raise LossError(
                    f"Batch.{name} is {float(clean[tuple(bad[0])])} at {at}, a valid position "
                    f"({len(bad)} such values). Drop that rollout or mask it; a loss over it would be meaningless."
                )

    @property
    def masked_reward(self) -> Tensor | None:
        """[N], the reward of completions whose tokens are all masked, NaN elsewhere and where it was not finite.

        None where rewards are of tokens, or not given.
        """
        found: Tensor | None = getattr(self, "_masked_reward", None)
        return found

    def _check_ranges(self, names: Collection[str]) -> None:
        for name, top in (("pair_probability", 1.0), ("pair_weight", torch.inf)):
            if name in names and not bool(((x := getattr(self, name)) >= 0).logical_and(x <= top).all()):
                row = int(((x < 0) | (x > top)).nonzero()[0])
                raise LossError(f"Batch.{name} is {float(x[row]):g} at row {row}, but must lie between 0 and {top:g}.")

    def require(self, name: str, owner: str) -> Tensor:
        """The field, or a LossError that says which loss needs it and who provides it."""
        tensor = getattr(self, name)
        if tensor is None:
            raise LossError(f"{owner} needs Batch.{name}, which is missing; it comes from {FIELDS[name].provider}.")
        return tensor

    @property
    def given(self) -> dict[str, Tensor]:
        """The fields that a forward pass of the policy does not change."""
        return {name: x for name, x in self._present.items() if not FIELDS[name].gradient}

    def rows(self, index: Tensor | slice) -> Batch:
        """The batch with these rows only, gradients kept. They were checked when they entered."""
        check_rows(index)
        new = self._with({name: x[index] for name, x in self._present.items()})
        return new._remembering(None if self.masked_reward is None else self.masked_reward[index])

    def replace(self, **changes: Any) -> Batch:
        """A copy with some fields changed; they are checked, and with another mask all are."""
        if "mask" in changes or changes.keys() - FIELDS.keys():
            new = Batch(**self._present | changes)
            before, after = self.masked_reward, new.masked_reward
            if before is None or after is None or "reward" in changes:
                return new
            return new._remembering(torch.where(self.live, after, before))
        new = self._with(self._present | changes)._remembering(self.masked_reward)
        new._check(list(changes))
        return new

    def masked(self, mask: Tensor) -> Batch:
        """With fewer valid tokens, for what counts them: nothing is checked, and the others keep what stands there."""
        return self._with(self._present | {"mask": mask})

    def to(self, device: torch.device | str) -> Batch:
        """A copy on this device, gradients kept."""
        new = self._with({name: x.to(device) for name, x in self._present.items()})
        return new._remembering(None if self.masked_reward is None else self.masked_reward.to(device))

    def _remembering(self, masked_reward: Tensor | None) -> Batch:
        object.__setattr__(self, "_masked_reward", masked_reward)
        return self

    def __len__(self) -> int:
        """N, the number of completions."""
        return len(self.valid)

    @property
    def _present(self) -> dict[str, Tensor]:
        return {name: x for name in FIELDS if (x := getattr(self, name)) is not None}

    @staticmethod
    def _with(fields: dict[str, Tensor]) -> Batch:
        """A batch of fields that need no check: on a GPU each check waits for the device."""
        new = object.__new__(Batch)
        for name in FIELDS:
            object.__setattr__(new, name, fields.get(name))
        return new

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
        wide = any(x.dtype == torch.float64 for x in self._present.values())
        return torch.float64 if wide else torch.float32

    def old(self, owner: str) -> Tensor:
        """old_logp detached, or logp detached: a missing old policy is the current one."""
        return (self.old_logp if self.old_logp is not None else self.require("logp", owner)).detach()


# Every field, in the order of Batch: the one list that others are made from.
FIELDS: dict[str, Field] = {f.name: f.metadata["about"] for f in dataclasses.fields(Batch)}


@dataclass(frozen=True)
class Normalizer:
    """How many things the loss of one update averages over, counted over the whole batch and all ranks.

    Every micro-batch and rank divides by these same numbers, so their losses and gradients add up to the whole.
    Whole numbers, unless a trainer gives shares of them.
    """

    tokens: float
    sequences: float
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
        """The normalizer of two ranks together (a prompt's completions must stay on one rank)."""
        units = None if self.units is None or other.units is None else self.units + other.units
        return Normalizer(
            self.tokens + other.tokens, self.sequences + other.sequences, self.groups + other.groups, units
        )


def check_rows(index: Any) -> None:
    """LossError: a number alone, which would take the dimension of the rows away."""
    if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
        i = int(index)
        raise LossError(f"rows({i}) is not a choice of rows. For row {i} alone: rows(torch.tensor([{i}])).")


def _as_tensor(name: str, given: Any) -> Tensor:
    field = FIELDS[name]
    if field.kind == "flag":
        return as_bool(name, given).detach()
    if field.kind == "whole":
        return as_whole_numbers(name, given).detach()
    tensor = as_numbers(name, given, score=field.kind == "score")
    return tensor if field.gradient else tensor.detach()

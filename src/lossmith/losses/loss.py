"""What every loss is, whatever it is made of: the record it gives back, and what can be asked of it.

A loss whose rows are separable works in two halves, so that it can run on micro-batches:

credit     whole rollout batch, no gradient: advantages, masks, and every normalizer
objective  with gradient, on any rows of it; the objectives of all rows add up to the loss

A loss that is not separable is evaluated on the whole batch at once.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError
from lossmith.losses.anatomy import Anatomy, measured
from lossmith.losses.axes.kl import KL, kl_estimate
from lossmith.losses.axes.value import ValueLoss
from lossmith.losses.batch import FIELDS, Batch, Normalizer, check_rows
from lossmith.losses.piece import shown

__all__ = ["Credit", "Loss", "LossOutput"]

Metrics = Callable[[], dict[str, float]]


def no_metrics() -> dict[str, float]:
    """Nothing was measured."""
    return {}


@dataclass(frozen=True, eq=False)
class Credit:
    """What the credit half hands to the objective half. Row i belongs to row i of the batch; no gradient."""

    advantage: Tensor  # [N, T], 0 at masked positions
    weight: Tensor  # [N, T], 1/Z of each token; rows that are left out have 0
    mismatch: Tensor | None  # [N, T], u, of the policy term only; None: the objective's to find (`needs_old_early`)
    returns: Tensor | None  # [N, T], the critic's target
    tokens: float  # valid tokens of the whole batch: what metrics are averaged over
    compute_metrics: Metrics = no_metrics
    kl_weight: Tensor | None = None  # [N, T], where the KL term is aggregated in another way
    entropy_weight: Tensor | None = None  # [N, T], likewise
    whole: int | None = None  # rows of the batch that it was computed over
    given: Mapping[str, Tensor] = field(default_factory=dict, repr=False)  # what it was computed from, by field

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Of the whole batch; measured when first asked for."""
        return self.compute_metrics()

    @property
    def parts(self) -> dict[str, Tensor]:
        """Its tensors [N, T] by name."""
        names = ("advantage", "weight", "mismatch", "returns", "kl_weight", "entropy_weight")
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def rows(self, index: Tensor | slice) -> Credit:
        """The credit of these rows."""
        check_rows(index)
        parts: dict[str, Any] = {name: x[index] for name, x in self.parts.items()}
        return dataclasses.replace(self, **parts, given={name: x[index] for name, x in self.given.items()})

    def check(self, loss: Loss, batch: Batch) -> None:
        """LossError if it is the credit of other rows, or of some rows only where the loss looks at all at once."""
        cure = "Take the same rows of both: batch.rows(index) and credit.rows(index)."
        for name, x in self.parts.items():
            if x.shape != batch.valid.shape:
                raise LossError(
                    f"{loss.name}: the credit is of other rows than the batch: its {name} has shape {list(x.shape)}, "
                    f"the batch {list(batch.valid.shape)}. {cure}"
                )
        differs = {n: d for n, x in self.given.items() if (d := _differs(x, getattr(batch, n))) is not None}
        if differs and bool(torch.stack(list(differs.values())).any()):  # asked once: on a GPU each question waits
            name = next(name for name, found in differs.items() if found)
            raise LossError(f"{loss.name}: the credit is of other rows than the batch: {name} differs. {cure}")
        if not loss.separable and self.whole not in (None, len(batch.valid)):
            raise LossError(
                f"{loss.name} looks at all rows of a batch at once, and was given {len(batch.valid)} of {self.whole}. "
                "Call it on the whole batch; only a loss that is `separable` adds up over parts."
            )


def _differs(a: Tensor, b: Tensor | None) -> Tensor | None:
    """Whether the numbers do; where one is of a narrower type, in that. None: there is nothing to compare."""
    if b is None or a is b:
        return None
    if a.shape != b.shape or a.device != b.device:
        return torch.ones((), dtype=torch.bool, device=a.device)
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return (a.to(narrow) != b.to(narrow)).any()


def as_floats(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as numbers of Python, in one transfer: on a GPU each one alone would wait for the device."""
    values = [x.detach() for x in tensors.values()]
    return dict(zip(tensors, torch.stack(values).tolist(), strict=True)) if values else {}


@dataclass(frozen=True, eq=False)
class LossOutput:
    """loss: scalar, minimized. advantage: [N, T]. terms: its parts.

    metrics: of a micro-batch, its shares of the whole batch's numbers (sums over its tokens, divided by the tokens of
    the whole), so that adding them up gives the numbers of the whole batch; a share alone is no mean.
    """

    loss: Tensor
    advantage: Tensor
    terms: dict[str, Tensor]
    compute_metrics: Metrics = field(default=no_metrics, repr=False)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Measured when first asked for: a loss that is only differentiated does not pay for them."""
        return self.compute_metrics()


@torch.no_grad()
def distance_metrics(batch: Batch, tokens: float) -> dict[str, float]:
    """How far the policy is from the old policy and the reference (k3, nats a token), and its entropy.

    tokens: of the whole batch, so that micro-batches add up.
    """
    sums: dict[str, Tensor] = {}
    for name, anchor in (("kl_old", batch.old_logp), ("kl_ref", batch.ref_logp)):
        if anchor is not None and batch.logp is not None:
            sums[name] = kl_estimate(batch.logp - anchor, "k3").sum()
    if batch.teacher_logp is not None and batch.logp is not None:
        sums["kl_teacher"] = (batch.logp - batch.teacher_logp).sum()
    if batch.divergence is not None:
        sums["divergence"] = batch.divergence.sum()
    if batch.entropy is not None:
        sums["entropy"] = batch.entropy.sum()
    return {name: total / max(tokens, 1) for name, total in as_floats(sums).items()}


@torch.no_grad()
def reward_metrics(batch: Batch) -> dict[str, float]:
    """Counts, and -E[r]: the loss's value is not the performance."""
    metrics = {"tokens": float(batch.tokens), "completions": float(batch.live.sum())}
    if batch.reward is not None and bool(batch.live.any()):
        total = batch.reward if batch.reward.ndim == 1 else batch.reward.sum(1)
        metrics["performance_loss"] = -float(total[batch.live].mean())
    return metrics


class OnlyCredit(LossOutput):
    """Advantages of a batch that has no log-probabilities: whoever asks it for the loss is told what is missing."""

    def __init__(self, advantage: Tensor, compute_metrics: Metrics, reason: LossError) -> None:
        super().__init__(advantage, advantage, {}, compute_metrics)
        object.__setattr__(self, "reason", reason)

    def __getattribute__(self, name: str) -> Any:
        if name in ("loss", "terms"):
            raise object.__getattribute__(self, "reason")
        return super().__getattribute__(name)


class Loss(ABC):
    """L(θ): a scalar from a Batch. `lossmith.losses.PolicyLoss` is the composition of axes that most losses are."""

    name: str
    kl: KL = KL()
    value: ValueLoss = ValueLoss()

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """What must be provided besides logp and mask: fields of Batch, and parameters that are not given yet."""

    @property
    def traps(self) -> tuple[str, ...]:
        """Reasons why this loss, though legal, misleads. Training refuses them unless allow_traps is set."""
        return ()

    @property
    def coupling(self) -> str:
        """How far the rows of a batch depend on each other: token, sequence, group or batch."""
        return "batch"

    @property
    def compares(self) -> str:
        """What a completion is compared with: "group" (others of its prompt), "batch" (others of the update), or "".

        Where there is nothing to compare with, one sample a prompt say, rewards give no signal.
        """
        return ""

    @property
    def of_truncated(self) -> str:
        """What becomes of completions that the token budget cut: "keep", "mask" (left out) or "zero" (reward 0)."""
        return "keep"

    @property
    def separable(self) -> bool:
        """Whether credit and objective may be split into rows; if not, the loss sees the whole batch at once."""
        return False

    @property
    def stops_gradient(self) -> bool:
        """Whether part of the loss depends on logp without gradient, so that it has no primitive function."""
        return False

    @property
    def divergence(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Log-probabilities [M, V] of policy and teacher -> what the loss wants of them at each position, [M]: for
        whoever has the models and computes Batch.divergence in chunks. None: it wants nothing of a vocabulary.
        """
        return None

    @property
    def homogeneous(self) -> bool:
        """Whether the policy term is homogeneous in A: with the credit cA it is c times what it is with A, for c > 0.

        A trainer may then put a factor (1/Z, say) into the advantages beforehand. For a separable loss the factor may
        differ between completions.
        """
        return False

    @property
    def credit_reads(self) -> frozenset[str]:
        """Fields of Batch that the credit half reads, besides mask: needed ones, and those it looks at where given."""
        return frozenset()

    @property
    def needs_old_early(self) -> bool:
        """Whether the credit half cannot do without old log-probabilities. Where it can, and the update is the first
        after them, the objective's own forward pass gives them: a missing old policy is the current one."""
        return "old_logp" in self.credit_reads

    @property
    def objective_reads(self) -> frozenset[str]:
        """Fields of Batch that the objective half reads, besides logp and mask; what must travel with the rows."""
        return (self.needs & FIELDS.keys()) | ({"old_logp"} if self.uses_old else frozenset())

    @property
    def uses_old(self) -> bool:
        """Whether old log-probabilities change anything (they do once a step makes several updates)."""
        return "old_logp" in self.needs

    # -- what it gives ----------------------------------------------------------------------------------------------

    @abstractmethod
    def __call__(self, batch: Batch, normalizer: Normalizer | None = None) -> LossOutput:
        """The loss of the batch. normalizer: counts over all ranks, where the batch is one rank's share."""

    @torch.no_grad()
    def credit(self, batch: Batch, normalizer: Normalizer | None = None) -> Credit:
        """The credit half. For losses that are not separable there is nothing to prepare."""
        zero = torch.zeros(batch.valid.shape, dtype=batch.dtype, device=batch.valid.device)
        n, tokens = len(batch.valid), batch.tokens
        return Credit(zero, zero, torch.ones_like(zero), None, tokens, whole=n, given=batch.given)

    def objective(self, batch: Batch, credit: Credit) -> LossOutput:
        """The objective half, on the rows that the credit is of. For losses that are not separable: all of them."""
        credit.check(self, batch)
        return self(batch)

    def completed(self, credit: Credit, batch: Batch) -> Credit:
        """The credit with what it left to the objective, from log-probabilities that the batch has by now."""
        return credit

    @torch.no_grad()
    def as_whole(self, credit: Credit, batch: Batch) -> Credit:
        """The same advantages where these rows are a batch of their own: normalizers are counted over them alone."""
        return dataclasses.replace(
            credit, weight=self.token_weights(batch), tokens=batch.tokens, whole=len(batch.valid)
        )

    def counts(self, batch: Batch) -> Normalizer:
        """What this batch counts. Where it is one rank's share: add those of all ranks, and give each the sum."""
        return Normalizer.of(batch.valid, batch.group)

    def token_weights(self, batch: Batch, normalizer: Normalizer | None = None) -> Tensor:
        """1/Z of each token, [N, T]."""
        return self.credit(batch, normalizer).weight

    def weight(self, ratio: Tensor | float, advantage: Tensor | float, old_prob: float = 0.3) -> Tensor:
        """w(r, A) = -(dℓ/dlogp)/A of a single token, before masks and aggregation."""
        raise NotImplementedError(f"{self.name} has no weight per token: it is a function of whole completions.")

    def closed_form_gradient(self, batch: Batch, credit: Credit | None = None) -> Tensor:
        """dL/dlogp [N, T] by formulas, not by autograd."""
        raise NotImplementedError(f"{self.name} states no closed form of its gradient.")

    def closed_form_beside(self, batch: Batch, credit: Credit | None = None) -> dict[str, Tensor]:
        """{field: dL/dfield} by formulas, of fields of Batch beside logp that the loss states one for."""
        return {}

    def anatomy(self, batch: Batch) -> Anatomy:
        """The numbers that multiply and add up to each token's -dL/dlogp; measured where a loss has no formulas."""
        logp = batch.require("logp", self.name).detach().clone().requires_grad_()
        with torch.enable_grad():
            return Anatomy((), (), measured(self(batch.replace(logp=logp)).terms, logp, batch.valid))

    # -- representations --------------------------------------------------------------------------------------------

    @abstractmethod
    def formula(self, style: str = "text") -> str:
        """The loss as text or "latex"."""

    def code(self) -> str:
        """The loss as plain torch."""
        raise NotImplementedError(f"{self.name} has no listing.")

    def __str__(self) -> str:
        return self.formula()

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The loss as flat parameters in JSON types; `parse_loss` reads them back."""

    @abstractmethod
    def replace(self, **changes: Any) -> Loss:
        """A copy with some parameters, options or parts changed, by the names that `to_dict` and `get_loss` use."""


def together(changes: Mapping[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Any]:
    """Flat parameters given as a mapping and as keywords. LossError: one is given twice, or is not named by text."""
    if not isinstance(changes or {}, Mapping):
        raise LossError(f"parameters are given by name, not as {shown(changes)}.")
    both = {**(changes or {}), **more}
    if len(both) < len(changes or ()) + len(more):
        raise LossError(f"{', '.join(sorted(set(changes or ()) & set(more)))} is given twice.")
    for key in both:
        if not isinstance(key, str):
            raise LossError(f"the name of a parameter is text, not {shown(key)}.")
    return both

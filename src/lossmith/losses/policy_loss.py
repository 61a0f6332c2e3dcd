"""The loss as a value: a point in a product of axes, evaluated in two halves.

credit     whole rollout batch, no gradient: shaping, KL in the reward, advantage, masks, and every normaliser
objective  per token, with gradient, on any micro-batch of it

    L = Σ_it  weight_it · [ u_it·ℓ(r_it, A_it) + β·k_it - c_H·H_it + c_V·v_it ]

weight_it comes from the aggregation over the whole batch, so the sum over any micro-batches is the same number.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError, TrapWarning
from lossmith.losses.advantage import BatchMean, Estimator, NoScale, Scale, Signal
from lossmith.losses.aggregate import Aggregate, PromptMean, TokenMean
from lossmith.losses.batch import Batch, Normalizer
from lossmith.losses.correction import Mismatch, NoMismatch
from lossmith.losses.flat import to_flat, with_flat
from lossmith.losses.formula import render
from lossmith.losses.kl import KL, kl_estimate, kl_slope
from lossmith.losses.legality import check_legal
from lossmith.losses.ratio import Ratio, TokenRatio
from lossmith.losses.shaping import Shaping
from lossmith.losses.trust import LogP, Trust
from lossmith.losses.value import ValueLoss

__all__ = ["Credit", "LossOutput", "PolicyLoss"]

_COUPLING = ("token", "sequence", "group", "batch")


@dataclass(frozen=True, eq=False)
class Credit:
    """What the credit half hands to the objective half. Row i belongs to row i of the batch; no gradient."""

    advantage: Tensor  # [N, T], 0 at masked positions
    weight: Tensor  # [N, T], 1/Z of each token; rows that are left out have 0
    mismatch: Tensor  # [N, T], u, of the policy term only
    returns: Tensor | None  # [N, T], the critic's target
    metrics: dict[str, float]  # of the whole batch
    tokens: int  # valid tokens of the whole batch: what metrics are averaged over

    def rows(self, index: Tensor | slice) -> Credit:
        """The credit of these rows."""
        returns = None if self.returns is None else self.returns[index]
        return Credit(
            self.advantage[index], self.weight[index], self.mismatch[index], returns, self.metrics, self.tokens
        )


@dataclass(frozen=True, eq=False)
class LossOutput:
    """loss: scalar, minimised. advantage: [N, T]. terms: its parts. metrics: they add up over micro-batches."""

    loss: Tensor
    advantage: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, float]


@dataclass(frozen=True)
class PolicyLoss:
    """L(θ) as a product of axes. Read the fields in the order of evaluation."""

    name: str = "custom"
    shaping: tuple[Shaping, ...] = ()
    advantage: Estimator = dataclasses.field(default_factory=BatchMean)
    scale: Scale = dataclasses.field(default_factory=NoScale)
    advantage_clip: float | None = None
    ratio: Ratio = dataclasses.field(default_factory=TokenRatio)
    trust: Trust = dataclasses.field(default_factory=LogP)
    mismatch: Mismatch = dataclasses.field(default_factory=NoMismatch)
    truncated: str = "keep"  # keep | mask | zero: what becomes of completions that the token budget cut
    group_filter: str = "none"  # none | zero_variance: leave out groups whose rewards are all equal
    kl: KL = dataclasses.field(default_factory=KL)
    entropy_coef: float = 0.0
    value: ValueLoss = dataclasses.field(default_factory=ValueLoss)
    aggregate: Aggregate = dataclasses.field(default_factory=TokenMean)

    def __post_init__(self) -> None:
        check_legal(self)
        for trap in self.traps:
            warnings.warn(f"{self.name}: {trap}.", TrapWarning, stacklevel=3)

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def traps(self) -> tuple[str, ...]:
        """Reasons why this composition, though legal, misleads. Training refuses them unless allow_traps is set."""
        return tuple(t for t in (self.trust.trap(), self.kl.trap()) if t)

    @property
    def needs(self) -> frozenset[str]:
        """What must be provided besides logp and mask; `max_length` is a parameter, the rest are batch fields."""
        pieces = (*self.shaping, self.advantage, self.scale, self.aggregate)
        needed = frozenset().union(*(p.needs for p in pieces)) | self.kl.required
        if all(getattr(p, "max_length", 1) is not None for p in pieces):
            needed -= {"max_length"}
        conditions = {
            "behavior_logp": not isinstance(self.mismatch, NoMismatch) or self.ratio.denominator == "behavior",
            "ref_logp": self.ratio.denominator == "ref",
            "entropy": self.entropy_coef > 0,
            "value": self.value.active,
            "truncated": self.truncated != "keep",
            "group": self.group_filter != "none",
        }
        return needed | {name for name, holds in conditions.items() if holds}

    @property
    def uses_old(self) -> bool:
        """Whether old log-probabilities change anything (they do once a step makes several updates)."""
        ratio = self._needs_ratio and self.ratio.denominator == "old"
        in_reward = self.kl.active and self.kl.place == "reward"
        return ratio or in_reward or not isinstance(self.mismatch, NoMismatch)

    @property
    def coupling(self) -> str:
        """How far credit couples rows: token, sequence, group or batch. The objective half never couples rows."""
        levels = [self.advantage.coupling, self.scale.coupling, "sequence" if self.ratio.per_sequence else "token"]
        if self.group_filter != "none" or isinstance(self.aggregate, PromptMean):
            levels.append("group")
        return max(levels, key=_COUPLING.index)

    def replace(self, **changes: Any) -> PolicyLoss:
        """A copy with some axes changed: `loss.replace(trust=Clip(low=0.2, high=0.28))`."""
        return dataclasses.replace(self, **changes)

    # -- credit -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def credit(self, batch: Batch, normalizer: Normalizer | None = None) -> Credit:
        """Whole batch -> advantages, token weights, mismatch weights, returns.

        normalizer: counts over all ranks, where this batch is one rank's share; by default this batch's own.
        """
        signal = self._signal(batch)
        advantage, raw = self._advantage(batch, signal)
        counts = self._group_counts(batch, signal)
        zero = torch.zeros((), dtype=advantage.dtype, device=advantage.device)
        weight = self.token_weights(batch, normalizer).to(advantage.dtype)
        return Credit(
            advantage=torch.where(batch.valid, advantage, zero),
            weight=weight,
            mismatch=self.mismatch(batch) if batch.logp is not None else self._mismatch_of_old(batch, weight),
            returns=self._returns(batch, raw),
            metrics=_credit_metrics(batch, advantage) | counts,
            tokens=normalizer.tokens if normalizer is not None else int(batch.valid.sum()),
        )

    @torch.no_grad()
    def token_weights(self, batch: Batch, normalizer: Normalizer | None = None) -> Tensor:
        """1/Z of each token, [N, T]: the aggregation over these rows, groups and truncated rows left out as asked.

        normalizer: counts over all ranks, where this batch is one rank's share; by default this batch's own.
        """
        counted = batch
        if self.group_filter == "zero_variance" and batch.reward is not None:
            constant = Signal(batch, batch.reward).groups("group_filter").constant
            counted = batch.replace(mask=batch.valid & ~constant[:, None])
        dtype = batch.logp.dtype if batch.logp is not None else torch.float32
        dtype = torch.promote_types(dtype, batch.reward.dtype) if batch.reward is not None else dtype
        norm = normalizer or Normalizer.of(counted.valid, batch.group)
        weights = self.aggregate.weights(counted, norm, dtype)
        if self.truncated == "mask":  # left out of the loss, still counted by the normaliser
            weights = torch.where(batch.require("truncated", "truncated='mask'")[:, None], 0.0, weights)
        return weights

    def _signal(self, batch: Batch) -> Signal | None:
        """Rewards after shaping, with the KL penalty taken off; None where the advantage is given."""
        if batch.advantage is not None:
            if self.kl.active and self.kl.place == "reward":
                raise LossError(
                    f"{self.name} takes its KL penalty off the reward, but Batch.advantage is given and bypasses it. "
                    "Give reward instead, or build the loss with beta=0."
                )
            if batch.reward is None:
                return None
        reward = batch.require("reward", self.name)
        for shaping in self.shaping:
            reward = shaping(reward, batch)
            if reward.ndim == 2:  # a shift would put a reward on padding
                reward = _valid(reward, batch)
        if self.truncated == "zero":
            cut = batch.require("truncated", "truncated='zero'")
            reward = torch.where(cut if reward.ndim == 1 else cut[:, None], torch.zeros_like(reward), reward)
        if self.kl.active and self.kl.place == "reward":
            reward = Signal(batch, reward).per_token - self.kl.penalty(batch)
        return Signal(batch, reward)

    def _advantage(self, batch: Batch, signal: Signal | None) -> tuple[Tensor, Tensor]:
        """(final advantage, advantage before scaling), both [N, T]."""
        if batch.advantage is not None:
            given = batch.advantage if batch.advantage.ndim == 2 else batch.advantage[:, None]
            given = given.expand(batch.valid.shape)
            return given, given
        assert signal is not None
        raw = self.advantage(signal)
        scaled = self.scale(raw, signal)
        if self.advantage_clip is not None:
            scaled = scaled.clamp(-self.advantage_clip, self.advantage_clip)
        return scaled, raw

    def _group_counts(self, batch: Batch, signal: Signal | None) -> dict[str, float]:
        """How many groups there are, and how many carry no signal because their rewards are all equal."""
        if batch.group is None or signal is None:
            return {}
        groups, live = signal.groups(self.name), signal.live
        constant = groups.index[live & groups.constant].unique().numel()
        return {"groups": float(groups.index[live].unique().numel()), "constant_groups": float(constant)}

    def _mismatch_of_old(self, batch: Batch, weight: Tensor) -> Tensor:
        """u where no forward pass has been made yet: from the old log-probabilities."""
        if isinstance(self.mismatch, NoMismatch):
            return torch.ones_like(weight)
        return self.mismatch(batch.replace(logp=batch.require("old_logp", "a mismatch correction")))

    def _returns(self, batch: Batch, raw: Tensor) -> Tensor | None:
        """The critic's target G = A + V_old, A before scaling; or Batch.returns.

        None with a given advantage and no returns: the estimator is bypassed, and its critic with it.
        """
        if not self.value.active or batch.returns is not None or batch.advantage is not None:
            return batch.returns if self.value.active else None
        old = batch.old_value if batch.old_value is not None else batch.require("value", self.name)
        return raw + old.detach()

    # -- objective --------------------------------------------------------------------------------------------------

    def objective(self, batch: Batch, credit: Credit) -> LossOutput:
        """The loss of these rows under that credit: scalar with gradient. Rows of a whole batch add up to its loss."""
        logp = batch.require("logp", self.name)
        ratio = self.ratio(batch) if self._needs_ratio else torch.ones_like(logp)
        advantage = self._row_advantage(batch, credit)
        policy = credit.mismatch * self.trust.value(ratio, advantage, logp)
        terms = {"policy": (credit.weight * _valid(policy, batch)).sum()}
        if self.kl.active and self.kl.place == "loss":
            terms["kl"] = self.kl.beta * (credit.weight * _valid(self.kl.term(batch, ratio), batch)).sum()
        if self.entropy_coef:
            entropy = batch.require("entropy", "entropy_coef")
            terms["entropy"] = -self.entropy_coef * (credit.weight * _valid(entropy, batch)).sum()
        if credit.returns is not None:
            terms["value"] = self.value.coef * (credit.weight * self.value.term(batch, credit.returns)).sum()
        loss = torch.stack([t.to(logp.dtype) for t in terms.values()]).sum()
        return LossOutput(loss, credit.advantage, terms, self._metrics(batch, credit, ratio, advantage))

    def __call__(self, batch: Batch, normalizer: Normalizer | None = None) -> LossOutput:
        """Both halves on one batch."""
        credit = self.credit(batch, normalizer)
        output = self.objective(batch, credit)
        return dataclasses.replace(output, metrics=credit.metrics | output.metrics)

    @property
    def _needs_ratio(self) -> bool:
        return self.trust.uses_ratio or (self.kl.active and self.kl.ratio_weight)

    def _row_advantage(self, batch: Batch, credit: Credit) -> Tensor:
        """A as the trust region sees it: one number a completion where the ratio is one."""
        advantage = credit.advantage
        if not self.ratio.per_sequence:
            return advantage
        mean = advantage.sum(1, keepdim=True) / batch.lengths.clamp(min=1)[:, None]
        return mean.expand_as(advantage)

    @torch.no_grad()
    def _metrics(self, batch: Batch, credit: Credit, ratio: Tensor, advantage: Tensor) -> dict[str, float]:
        # means over all valid tokens, whatever the aggregation
        weight = batch.valid.to(credit.weight.dtype) / max(credit.tokens, 1)
        metrics: dict[str, float] = {}
        if self._needs_ratio:
            metrics["ratio"] = float((weight * ratio).sum())
            stopped = self.trust.weight(ratio, advantage) == 0
            metrics["clip_fraction"] = float((weight * stopped).sum())
        if batch.old_logp is not None and batch.logp is not None:
            moved = _valid(batch.logp - batch.old_logp, batch)
            metrics["kl_old"] = float((weight * kl_estimate(moved, "k3")).sum())
        if batch.ref_logp is not None:
            metrics["kl_ref"] = float((weight * kl_estimate(self.kl.kappa(batch), "k3")).sum())
        if batch.entropy is not None:
            metrics["entropy"] = float((weight * batch.entropy).sum())
        return metrics

    # -- closed forms -----------------------------------------------------------------------------------------------

    def weight(self, ratio: Tensor | float, advantage: Tensor | float) -> Tensor:
        """w(r, A) = -(dℓ/dlogp)/A in closed form, before masks and aggregation; at A = 0 the limit A -> 0+."""
        return self.trust.weight(_tensor(ratio), _tensor(advantage))

    @torch.no_grad()
    def closed_form_gradient(self, batch: Batch, credit: Credit | None = None) -> Tensor:
        """dL/dlogp [N, T] by the formulas, not by autograd: -w·A·u/Z plus the KL term's slope (not for `full`)."""
        credit = credit or self.credit(batch)
        ratio = self.ratio(batch) if self._needs_ratio else torch.ones_like(credit.weight)
        advantage = self._row_advantage(batch, credit)
        slope = -credit.weight * credit.mismatch * self.trust.weight(ratio, advantage) * advantage
        gradient = self.ratio.chain(slope, batch) if self._is_ratio_loss else slope
        if self.kl.active and self.kl.place == "loss" and self.kl.estimator != "full":
            kappa = self.kl.kappa(batch)
            k = kl_slope(kappa, "k2" if self.kl.straight_through else self.kl.estimator)
            if self.kl.ratio_weight:
                per_ratio = credit.weight * kl_estimate(kappa, self.kl.estimator) * ratio
                gradient = gradient + self.kl.beta * (self.ratio.chain(per_ratio, batch) + credit.weight * ratio * k)
            else:
                gradient = gradient + self.kl.beta * credit.weight * k
        return _valid(gradient, batch)

    @property
    def _is_ratio_loss(self) -> bool:
        """ℓ depends on logp through r (rather than through logp times a constant)."""
        with torch.enable_grad():  # asked from closed forms, which keep no graph
            probe = torch.tensor([1.0], requires_grad=True)
            return self.trust.value(probe, torch.ones(1), torch.zeros(1)).requires_grad

    # -- representations --------------------------------------------------------------------------------------------

    def formula(self, style: str = "text") -> str:
        """The loss as text or "latex", generated from the composition."""
        return render(self, style)

    def __str__(self) -> str:
        return self.formula()

    def to_dict(self) -> dict[str, Any]:
        """The composition as flat parameters, complete; `from_dict` reads it back, and get_loss accepts every key."""
        return to_flat(self)

    @staticmethod
    def from_dict(flat: dict[str, Any]) -> PolicyLoss:
        """The composition that `to_dict` wrote."""
        return with_flat(PolicyLoss(), {"name": "custom", **flat})


def _valid(x: Tensor, batch: Batch) -> Tensor:
    """x at valid positions, 0 elsewhere: selected, not multiplied."""
    return torch.where(batch.valid, x, torch.zeros_like(x))


def _tensor(x: Tensor | float) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)


def _credit_metrics(batch: Batch, advantage: Tensor) -> dict[str, float]:
    kept = advantage[batch.valid]
    metrics = {
        "tokens": float(batch.valid.sum()),
        "completions": float(batch.valid.any(1).sum()),
        "advantage_abs": float(kept.abs().mean()) if len(kept) else 0.0,
    }
    if batch.reward is not None:
        total = batch.reward if batch.reward.ndim == 1 else batch.reward.sum(1)
        live = batch.valid.any(1)
        metrics["performance_loss"] = (
            -float(total[live].mean()) if bool(live.any()) else 0.0
        )  # -E[r], the book's first job
    return metrics

"""The loss as a value: a point in a product of axes, evaluated in two halves.

credit     whole rollout batch, no gradient: shaping, KL in the reward, advantage, masks, and every normalizer
objective  per token, with gradient, on any micro-batch of it

    L = Σ_it  weight_it · [ u_it·ℓ(r_it, A_it) + β·k_it - c_H·H_it + c_V·v_it ]

weight_it comes from the aggregation over the whole batch, so the sum over any micro-batches is the same number.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError, TrapWarning
from lossmith.losses.anatomy import Anatomy, Link, Pull
from lossmith.losses.as_tensor import wide
from lossmith.losses.axes.advantage import Signal
from lossmith.losses.axes.aggregate import AGGREGATE, Aggregate
from lossmith.losses.axes.extra.divergence import Divergence
from lossmith.losses.axes.trust import Tokens
from lossmith.losses.batch import Batch, Normalizer
from lossmith.losses.composition.composition import Composition
from lossmith.losses.composition.flat import to_flat, with_flat
from lossmith.losses.composition.formula import render
from lossmith.losses.composition.legality import check_legal
from lossmith.losses.composition.listing import listing
from lossmith.losses.loss import Credit, Loss, LossOutput, OnlyCredit, as_floats, distance_metrics, reward_metrics

__all__ = ["PolicyLoss"]


@dataclass(frozen=True)
class PolicyLoss(Composition, Loss):
    """L(θ) as a product of axes; the fields are those of `Composition`."""

    def __post_init__(self) -> None:
        check_legal(self)
        for trap in self.traps:
            warnings.warn(f"{self.name}: {trap}.", TrapWarning, stacklevel=3)

    def replace(self, **changes: Any) -> PolicyLoss:
        """A copy with parameters, options or pieces changed: `loss.replace(clip_high=0.28, advantage_scale="none")`,
        `loss.replace(trust=Clip(low=0.2, high=0.28))`.

        LossError: a name that is none of these, or a composition that means nothing.
        """
        return with_flat(self, changes)

    @property
    def divergence(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        return self.extra.at if isinstance(self.extra, Divergence) else None

    # -- credit -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def credit(self, batch: Batch, normalizer: Normalizer | None = None) -> Credit:
        """Whole batch -> advantages, token weights, mismatch weights, returns.

        normalizer: counts over all ranks, where this batch is one rank's share; by default this batch's own.
        """
        signal = self._signal(batch)
        advantage, raw = self._advantage(batch, signal)
        advantage = self._as_narrow(advantage, batch, signal)
        weight = self.token_weights(batch, normalizer)
        return Credit(
            advantage=advantage,
            weight=weight,
            mismatch=self._early_mismatch(batch, weight),
            returns=self._returns(batch, signal, raw),
            tokens=normalizer.tokens if normalizer is not None else batch.tokens,
            compute_metrics=lambda: _credit_metrics(batch, advantage) | self._group_counts(batch, signal),
            whole=len(batch.valid),
            given=batch.given,
            **self._other_weights(batch, normalizer),
        )

    def as_whole(self, credit: Credit, batch: Batch) -> Credit:
        return dataclasses.replace(super().as_whole(credit, batch), **self._other_weights(batch, None))

    def _other_weights(self, batch: Batch, normalizer: Normalizer | None) -> dict[str, Any]:
        """Weights of the terms that are aggregated in another way than the policy term."""
        how = {"kl_weight": self.kl_aggregate, "entropy_weight": self.entropy_aggregate}
        return {k: self._weights_by(AGGREGATE[x](), batch, normalizer) for k, x in how.items() if x != "same"}

    @torch.no_grad()
    def token_weights(self, batch: Batch, normalizer: Normalizer | None = None) -> Tensor:
        """1/Z of each token, [N, T]: the aggregation over these rows, groups and truncated rows left out as asked.

        normalizer: counts over all ranks, where this batch is one rank's share; by default this batch's own.
        """
        return self._weights_by(self.aggregate, batch, normalizer)

    def counts(self, batch: Batch) -> Normalizer:
        """Of what takes part: completions that the filter leaves out are not counted."""
        return Normalizer.of(self._counted(batch).valid, batch.group)

    def _counted(self, batch: Batch) -> Batch:
        taking_part = self.group_filter.keep(batch)
        return batch if taking_part is None else batch.masked(batch.valid & taking_part[:, None])

    def _weights_by(self, aggregate: Aggregate, batch: Batch, normalizer: Normalizer | None) -> Tensor:
        norm = self.counts(batch) if self.local_normalizer or normalizer is None else normalizer
        weights = aggregate.weights(self._counted(batch), norm, batch.dtype)
        if self.truncated == "mask":  # left out of the loss, still counted by the normalizer
            weights = torch.where(batch.require("truncated", "truncated='mask'")[:, None], 0.0, weights)
        return weights

    def _as_narrow(self, x: Tensor, batch: Batch, signal: Signal | None, *, squared: bool = False) -> Tensor:
        """[N, T] in the type of the batch, 0 at masked positions. LossError: gradients would overflow with it."""
        x, kind = _valid(x, batch), batch.dtype if batch.logp is None else batch.logp.dtype
        limit = torch.finfo(kind).max / 1e6
        limit = math.sqrt(limit) if squared else limit
        if not bool((x.abs() <= limit).all()):
            rewards = "the rewards" if signal is None else f"rewards of {float(signal.reward.abs().max()):.3g}"
            raise LossError(
                f"{self.name}: {rewards} are too large: with them the {'critic' if squared else 'loss'} leaves what "
                f"{kind} holds. Scale them (shaping='scale', a=...), or divide by their spread (advantage_scale='...')."
            )
        return x.to(batch.dtype)

    def _signal(self, batch: Batch) -> Signal | None:
        """Rewards after shaping, with the KL penalty taken off, in float64; None where the advantage is given."""
        if batch.advantage is not None:
            if self.kl.in_reward:
                raise LossError(
                    f"{self.name} takes its KL penalty off the reward, but Batch.advantage is given and bypasses it. "
                    "Give reward instead, or build the loss with beta=0."
                )
            if batch.reward is None:
                return None
        *_, (_, _, reward) = self._shaped(batch)
        _check_size(self.name, reward, batch)
        # a reward by token is nowhere where no token counts
        return Signal(batch, reward, self._counted_rewards(batch) if reward.ndim == 1 else None)

    def _counted_rewards(self, batch: Batch) -> Tensor | None:
        """[N] bool: completions with a valid token, and masked ones that keep their reward; None: the former alone."""
        kept = batch.masked_reward
        if self.masked == "leave" or kept is None or "reward_parts" in self.needs:
            return None
        return batch.live | torch.isfinite(kept)

    def _shaped(self, batch: Batch) -> Iterator[tuple[str, str, Tensor]]:
        """(name, formula, reward [N] or [N, T]): the score, and what it is after each step of shaping."""
        reward, counted = wide(self._reward(batch)), self._counted_rewards(batch)
        if counted is not None and batch.masked_reward is not None:
            reward = torch.where(counted & ~batch.live, wide(batch.masked_reward), reward)
        yield "score", "R", reward
        for shaping in self.shaping:
            reward = shaping(reward, batch)
            if reward.ndim == 2:  # a shift would put a reward on padding
                reward = _valid(reward, batch)
            yield f"after shaping: {shaping.option}", shaping.formula(), reward
        if self.truncated == "zero":
            cut = batch.require("truncated", "truncated='zero'")
            reward = torch.where(cut if reward.ndim == 1 else cut[:, None], torch.zeros_like(reward), reward)
            yield "after truncation", "0 where the token budget cut it", reward
        if self.kl.in_reward:
            reward = Signal(batch, reward).per_token - self.kl.penalty(batch)
            yield "after the KL penalty", f"Σ_t (r_t − {self.kl.formula()})", reward

    def _reward(self, batch: Batch) -> Tensor:
        """Batch.reward; zeros where nothing of this loss reads a reward."""
        if batch.reward is None and not self.needs & {"reward", "reward_parts"}:
            return torch.zeros(len(batch.valid), dtype=batch.dtype, device=batch.valid.device)
        return batch.require("reward", self.name)

    def _advantage(self, batch: Batch, signal: Signal | None) -> tuple[Tensor, Tensor]:
        """(final advantage, advantage before scaling), both [N, T]."""
        if batch.advantage is not None:
            given = batch.advantage if batch.advantage.ndim == 2 else batch.advantage[:, None]
            given = given.expand(batch.valid.shape)
            return given, given
        assert signal is not None
        raw = self.advantage(signal)
        scaled = self.advantage_scale(raw, signal) * self.advantage_mul
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

    def _early_mismatch(self, batch: Batch, weight: Tensor) -> Tensor | None:
        """u before there is a forward pass: from the old log-probabilities. None: from the objective's own."""
        if not self.mismatch.acts:
            return torch.ones((), dtype=weight.dtype, device=weight.device).expand_as(weight)
        if batch.logp is not None:
            return self.mismatch(batch)
        if batch.old_logp is None and self.mismatch.coupling == "token":
            batch.require("behavior_logp", "a mismatch correction")
            return None
        return self.mismatch(batch.replace(logp=batch.require("old_logp", "a mismatch correction")))

    @torch.no_grad()
    def completed(self, credit: Credit, batch: Batch) -> Credit:
        if credit.mismatch is not None:
            return credit
        return dataclasses.replace(credit, mismatch=self._early_mismatch(batch, credit.weight))

    def _returns(self, batch: Batch, signal: Signal | None, raw: Tensor) -> Tensor | None:
        """The critic's target: what its estimator says (A before scaling plus V_old, as a rule), or Batch.returns.

        None with a given advantage and no returns: the estimator is bypassed, and its critic with it.
        """
        bypassed = batch.advantage is not None and self.advantage.acts
        if not self.value.active or batch.returns is not None or bypassed:
            return batch.returns if self.value.active else None
        if not self.advantage.critic or signal is None:
            return batch.require("returns", self.name)
        return self._as_narrow(self.advantage.target(signal, raw), batch, signal, squared=True)

    # -- objective --------------------------------------------------------------------------------------------------

    def objective(self, batch: Batch, credit: Credit) -> LossOutput:
        """The loss of these rows under that credit: scalar with gradient. Rows of a whole batch add up to its loss.

        LossError: the credit is of other rows.
        """
        credit.check(self, batch)
        credit = self.completed(credit, batch)  # once: the policy term, a masked KL term and the metrics read it
        terms: dict[str, Tensor] = {}
        at = self._tokens(batch, credit)
        if at is not None and self.advantage.acts:
            weight = credit.weight * self._factor(batch, credit)  # first: neither has a gradient
            terms["policy"] = (weight * self.trust.value(at)).sum()
        if at is not None and self.kl.in_loss:
            weight = credit.weight if credit.kl_weight is None else credit.kl_weight
            weight = weight * self._factor(batch, credit) if self.kl.masked else weight
            terms["kl"] = self.kl.beta * (weight * self.kl.term(batch, at.ratio)).sum()
        if self.entropy_coef:
            weight = credit.weight if credit.entropy_weight is None else credit.entropy_weight
            entropy = batch.require("entropy", "entropy_coef")
            terms["entropy"] = -self.entropy_coef * (weight * entropy).sum()
        if self.extra.acts:
            terms[self.extra.option] = (credit.weight * self.extra.value(batch, credit.advantage)).sum()
        if credit.returns is not None:
            terms["value"] = self.value.coef * (credit.weight * self.value.term(batch, credit.returns)).sum()
        loss = torch.stack([t.to(credit.weight.dtype) for t in terms.values()]).sum()
        return LossOutput(loss, credit.advantage, terms, lambda: self._metrics(batch, credit, at))

    def __call__(self, batch: Batch, normalizer: Normalizer | None = None) -> LossOutput:
        """Both halves on one batch; advantages alone where it has no log-probabilities."""
        credit = self.credit(batch, normalizer)
        try:
            output = self.objective(batch, credit)
        except LossError as error:
            if batch.logp is not None:
                raise
            return OnlyCredit(credit.advantage, credit.compute_metrics, error)
        return dataclasses.replace(output, compute_metrics=lambda: credit.metrics | output.metrics)

    def _tokens(self, batch: Batch, credit: Credit) -> Tokens | None:
        """What the trust region sees; None where there is neither a policy nor a KL term to see anything."""
        if batch.logp is None and not self.advantage.acts and not self.kl.active:
            return None
        logp = batch.require("logp", self.name)
        ratio = self.ratio_level(batch) if self.needs_ratio else torch.ones_like(logp[:1, :1]).expand_as(logp)
        if self.ratio_level.per_sequence:  # one number a completion stays one, [N, 1], until it meets the tokens
            ratio = ratio[:, :1]
        denominator_logp = self.ratio_level.denominator_logp(batch) if self.needs_ratio else logp.detach()
        return Tokens(ratio, self._row_advantage(batch, credit), logp, denominator_logp, batch.valid, batch)

    def _row_advantage(self, batch: Batch, credit: Credit) -> Tensor:
        """A as the trust region sees it: one number a completion where the ratio is one and carries the gradient."""
        advantage = credit.advantage
        if not self.ratio_level.per_sequence or self.trust.through != "ratio":
            return advantage
        mean = advantage.sum(1, keepdim=True) / batch.lengths.clamp(min=1)[:, None]
        return mean if advantage.shape[1] else advantage

    @torch.no_grad()
    def _factor(self, batch: Batch, credit: Credit) -> Tensor:
        """What the policy term of each token is multiplied with: mismatch weight and masks, [N, T] without gradient."""
        factor = credit.mismatch
        assert factor is not None
        for _, keep, _ in self._kept(batch, credit):
            factor = factor * keep
        return factor

    def _kept(self, batch: Batch, credit: Credit) -> Iterator[tuple[str, Tensor, str]]:
        """(name, bool [N, T], formula) of each mask that may leave something out."""
        for name, mask in (("token mask", self.token_mask), ("sequence mask", self.sequence_mask)):
            keep = mask.keep(batch, credit.advantage)
            if keep is not None:
                yield name, keep, mask.formula() or ""

    @torch.no_grad()
    def _metrics(self, batch: Batch, credit: Credit, at: Tokens | None) -> dict[str, float]:
        # means over all valid tokens, whatever the aggregation
        weight = batch.valid.to(credit.weight.dtype) / max(credit.tokens, 1)
        means: dict[str, Tensor] = {}
        if at is not None and self.needs_ratio:
            means["ratio"] = (weight * at.ratio).sum()
            stopped = (self.trust.weight(at) == 0) | (self._factor(batch, credit) == 0)
            means["clip_fraction"] = (weight * stopped).sum()
            clipped = (self.trust.weight(at) == 0) & (self.trust.weight(at.on_policy()) != 0)
            means["clipped_above"] = (weight * (clipped & (at.ratio > 1))).sum()
            means["clipped_below"] = (weight * (clipped & (at.ratio < 1))).sum()
        return as_floats(means) | distance_metrics(batch, credit.tokens)

    # -- closed forms -----------------------------------------------------------------------------------------------

    def weight(self, ratio: Tensor | float, advantage: Tensor | float, old_prob: float = 0.3) -> Tensor:
        """w(r, A) = -(dℓ/dlogp)/A of a single token in closed form, before masks and aggregation.

        At A = 0 the limit A -> 0+. old_prob: the token's old probability, for losses that look at it.
        """
        r, a = torch.broadcast_tensors(_tensor(ratio), _tensor(advantage))
        if self.ratio_level.denominator == "self":  # the ratio is 1 wherever the old policy is
            r = torch.ones_like(r)
        return self.trust.weight(Tokens.single(r, a, old_prob)).reshape(r.shape)

    @torch.no_grad()
    def closed_form_gradient(self, batch: Batch, credit: Credit | None = None) -> Tensor:
        """dL/dlogp [N, T] by the formulas, not by autograd: -w·A·u/Z plus the slopes of the other terms."""
        if self.kl.in_loss and self.kl.estimator == "full":
            raise NotImplementedError("kl_estimator='full' does not act through the sampled token's logp.")
        credit = self.completed(credit or self.credit(batch), batch)
        credit.check(self, batch)
        gradient = torch.zeros_like(credit.weight)
        for pull in self._pulls(batch, credit):
            gradient = gradient - pull.value
        return gradient

    @torch.no_grad()
    def closed_form_beside(self, batch: Batch, credit: Credit | None = None) -> dict[str, Tensor]:
        if not self.extra.acts or self.extra.through != "vocab_logp":
            return {}
        credit = credit or self.credit(batch)
        return {"vocab_logp": credit.weight[..., None] * self.extra.vocabulary_slope(batch)}

    def _pulls(self, batch: Batch, credit: Credit) -> Iterator[Pull]:
        """The terms of -dL/dlogp, by the formulas of the pieces."""
        at = self._tokens(batch, credit)
        if at is None:
            return
        weight = ("weight", credit.weight, f"1/Z: {self.aggregate.formula()}")
        factor = [*self._kept(batch, credit)]
        if credit.mismatch is not None and self.mismatch.acts:
            factor = [("mismatch", credit.mismatch, f"u = {self.mismatch.formula()}"), *factor]
        by_ratio = self.ratio_level.chain(torch.ones_like(credit.weight), batch) if self.needs_ratio else None
        if self.advantage.acts:
            passed = self.trust.spread(_valid(torch.ones_like(credit.weight), batch), at)
            if self.trust.through == "ratio":
                assert by_ratio is not None
                passed = self.ratio_level.chain(passed, batch)
            shared = self.trust.spreads or (self.trust.through == "ratio" and self.ratio_level.per_sequence)
            yield self._pull("policy", [*self.trust.factors(at), *factor, weight], batch, passed, shared)
        if self.kl.in_loss and self.kl.estimator != "full":  # that does not act through logp
            beta = ("coefficient", torch.full_like(credit.weight, -self.kl.beta), "−β")
            if credit.kl_weight is not None:
                weight = ("weight", credit.kl_weight, f"1/Z: {AGGREGATE[self.kl_aggregate]().formula()}")
            by_logp, by_log_ratio = self.kl.slopes(batch, at.ratio)
            rest = [*(factor if self.kl.masked else []), weight]
            slope = ("slope", by_logp, f"of {self.kl.formula()}, without β, along log π_θ(y_t)")
            yield self._pull("kl", [beta, slope, *rest], batch)
            if by_log_ratio is not None:
                slope = ("slope", by_log_ratio, "of the same, through the ratio r that weights it")
                yield self._pull("kl", [beta, slope, *rest], batch, by_ratio, self.ratio_level.per_sequence)
        if self.extra.acts and self.extra.through == "logp":
            slope = ("slope", -self.extra.slope(batch, credit.advantage), f"of {self.extra.formula()}")
            yield self._pull(self.extra.option, [slope, ("weight", credit.weight, weight[2])], batch)

    def _pull(
        self,
        name: str,
        factors: list[tuple[str, Tensor, str]],
        batch: Batch,
        passed: Tensor | None = None,
        shared: bool = False,
    ) -> Pull:
        """passed [N, T]: what reaches each token of slopes of 1 at all tokens; 1 where it is None."""
        links = [Link(what, _valid(x.expand_as(batch.valid), batch), words) for what, x, words in factors]
        if passed is None:
            return Pull(name, tuple(links), batch.valid)
        if shared:  # all tokens of a completion add up, and each gets an equal part, or none
            return Pull(name, tuple(links), batch.valid, passed / batch.lengths.clamp(min=1)[:, None])
        if not bool((passed == 1)[batch.valid].all()):
            links.append(Link("within reach", _valid(passed, batch), "0 where the ratio's own clamp (±20 nats) holds"))
        return Pull(name, tuple(links), batch.valid)

    @torch.no_grad()
    def anatomy(self, batch: Batch) -> Anatomy:
        credit = self.credit(batch)
        at = self._tokens(batch, credit)
        moved = tuple(self._moved(batch, at)) if at is not None and self.needs_ratio else ()
        return Anatomy(tuple(self._to_advantage(batch, credit)), moved, tuple(self._pulls(batch, credit)))

    def _to_advantage(self, batch: Batch, credit: Credit) -> Iterator[Link]:
        """From the score to the advantage: A = clip((R' - baseline - shift)/divisor · factor)."""

        def link(name: str, x: Tensor | float, words: str) -> Link:
            x = torch.as_tensor(x, dtype=credit.advantage.dtype, device=batch.valid.device)
            return Link(name, _valid((x[:, None] if x.ndim == 1 else x).expand(batch.valid.shape), batch), words)

        signal = self._signal(batch)
        if signal is not None:
            for name, words, reward in self._shaped(batch):
                yield link(name, Signal(batch, reward).per_sequence, words)
        if batch.advantage is None and signal is not None and self.advantage.acts:
            baseline, raw = self.advantage.baseline(signal), self.advantage(signal)
            if baseline is not None:
                yield link("baseline", baseline, self.advantage.compared_to)
            yield link("before scaling", raw, self.advantage.formula())
            if self.advantage_scale.acts:
                shift, divisor = self.advantage_scale.parts(raw, signal)
                if bool(shift.any()):
                    yield link("shift", shift, f"taken off: {self.advantage_scale.shifted_by}")
                yield link("divisor", divisor, self.advantage_scale.divided_by)
            if self.advantage_mul != 1:
                yield link("factor", self.advantage_mul, "advantage_mul")
            if self.advantage_clip is not None:
                yield link("bound", self.advantage_clip, "largest |A|: advantage_clip")
        if self.advantage.acts:
            yield link("advantage", credit.advantage, "A" if batch.advantage is None else "A, as given")

    def _moved(self, batch: Batch, at: Tokens) -> Iterator[Link]:
        yield Link("ratio", at.ratio.expand_as(batch.valid), f"r = {self.ratio_level.formula()}")
        if not self.trust.uses_ratio:
            return
        bounds = self.trust.bounds(at)
        if bounds is not None:
            for name, bound in zip(("lower bound", "upper bound"), bounds, strict=True):
                x = torch.as_tensor(bound, dtype=at.ratio.dtype, device=batch.valid.device)
                yield Link(name, x.expand(batch.valid.shape), "of the ratio")
        cut = (self.trust.weight(at) == 0) & (self.trust.weight(at.on_policy()) != 0)
        yield Link("cut off", cut.expand_as(batch.valid).to(at.ratio.dtype), self.trust.formula())

    # -- representations --------------------------------------------------------------------------------------------

    def formula(self, style: str = "text") -> str:
        """The loss as text or "latex", generated from the composition."""
        return render(self, style)

    def code(self) -> str:
        """The loss as a function of plain torch, generated from the composition; tests run it against the loss."""
        return listing(self)

    def to_dict(self) -> dict[str, Any]:
        """The composition as flat parameters, complete; `from_dict` reads it back, and get_loss accepts every key."""
        return to_flat(self)

    @staticmethod
    def from_dict(flat: dict[str, Any]) -> PolicyLoss:
        """The composition that `to_dict` wrote."""
        return with_flat(PolicyLoss(), {"name": "custom", **flat})


def _check_size(owner: str, reward: Tensor, batch: Batch) -> None:
    """LossError: rewards whose sums and differences would overflow, and lose their order without a word."""
    live = torch.where(batch.live if reward.ndim == 1 else batch.valid, reward, 0.0).abs()
    largest = torch.finfo(reward.dtype).max / 1e6
    if not bool((live <= largest).all()):
        row = int((~(live <= largest)).nonzero()[0, 0])
        raise LossError(
            f"{owner}: the reward at row {row} is beyond ±{largest:.3g}, where differences of rewards overflow. "
            "Let the scorer give smaller numbers, or scale them (shaping='scale', a=...)."
        )


def _valid(x: Tensor, batch: Batch) -> Tensor:
    """x at valid positions, 0 elsewhere: selected, not multiplied."""
    return torch.where(batch.valid, x, 0.0)


def _tensor(x: Tensor | float) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)


def _credit_metrics(batch: Batch, advantage: Tensor) -> dict[str, float]:
    kept = advantage[batch.valid]
    return reward_metrics(batch) | {"advantage_abs": float(kept.abs().mean()) if len(kept) else 0.0}

"""Whether somebody's loss function is the loss that it is taken for, called as its trainer calls it.

assert_conforms(my_loss, "grpo@trl", convention="verl") raises at the first difference and says in words what it is:
the sign, the side of the clip, the normalizer, a mask, a gradient that is stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError, ProofError, nearest, quiet_traps
from lossmith.losses import Batch, PolicyLoss, get_loss
from lossmith.proofs.conventions import CONVENTIONS, Convention, Given
from lossmith.proofs.differences import Comparison, describe

__all__ = ["assert_conforms"]

LENGTHS = (7, 3, 7, 1, 5, 2)
WIDTH = 7
CURVE = torch.cat([torch.linspace(0.05, 0.995, 190), torch.linspace(1.005, 3.0, 400)]).double()  # ratios, 1 apart
_HELD = frozenset({"logp", "mask", "advantage", "old_logp", "ref_logp", "behavior_logp", "entropy", "truncated"})
DRIFTS = (0.3, 1.5, 0.001)  # spread of the log-ratios: around usual clips, far outside, clips of a few ten-thousandths


def assert_conforms(
    function: Callable[..., Any],
    loss: str | PolicyLoss,
    convention: str | Convention = "tensors",
    *,
    config: Any = None,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> None:
    """Nothing where `function` is the named loss; otherwise ProofError with the first difference in words.

    function: a function of tensors, as the trainer of `convention` calls it: "tensors" (by the names of its
        parameters: logp, old_logp, advantages [N, T], mask, ...), "trl" (the same, advantages [N]), "verl",
        "openrlhf", "skyrl", "prime_rl", "nemo_rl" or "tinker" (the signatures of their hooks)
    loss: a name ("grpo@trl", "grpo@trl(clip_high=0.28)") or a loss. Advantages are given, so its estimator plays no
        part, and terms that the trainer adds by itself (verl's KL and entropy, say) are left out of it.
    config: the trainer's configuration object, where the function reads one
    tolerance: largest difference over the largest number. Everything is float64; a function that computes in float32
        needs about 1e-4.
    seed: of the random batches; the same seed gives the same batches

    Compared are value and dL/dlogp, in this order: single tokens at ratios from 0.05 to 3 under advantages of both
    signs, whole rows near and far from the old policy, advantages by token, padding, what stands at masked positions,
    a row without a token, and pieces of a batch under the counts of the whole. LossError: the loss is not one of
    given advantages.
    """
    how = _convention(convention)
    named = _policy_part(get_loss(loss) if isinstance(loss, str) else loss, how)
    case = _Case(function, named, how, config, seed)
    for batch in _BATCHES:
        for found in batch(case):
            if not found.agrees(found.ours, tolerance):
                others = [other for make in (_one_token, *_BATCHES[:-3]) for other in make(case)]
                raise ProofError(describe(found, others, case.like, tolerance))


def _convention(convention: str | Convention) -> Convention:
    if isinstance(convention, Convention):
        return convention
    if convention not in CONVENTIONS:
        raise ProofError(f"there is no convention {convention!r}.{nearest(str(convention), CONVENTIONS)}")
    return CONVENTIONS[convention]


def _policy_part(loss: Any, how: Convention) -> PolicyLoss:
    """The named loss without what the trainer adds, with the aggregation that is the trainer's."""
    if not isinstance(loss, PolicyLoss):
        raise LossError(f"{loss.name} is not a loss of given advantages per token; nothing can be held against it.")
    changes: dict[str, Any] = {}
    if "entropy" in how.outside:
        changes |= {"entropy_coef": 0.0}
    if "value" in how.outside:
        changes |= {"value_coef": 0.0}
    if "kl" in how.outside or loss.kl.in_reward:  # a penalty in the reward is part of the advantage that is given
        changes |= {"beta": 0.0}
    if how.aggregate is not None:
        changes |= {"aggregate": how.aggregate}
    if loss.aggregate.missing and how.aggregate is None:
        changes |= {"max_length": WIDTH}
    with quiet_traps():
        named = loss.replace(**changes)
        reads = named.replace(advantage="given", advantage_scale="none").needs if named.advantage.acts else frozenset()
    if not named.advantage.acts:
        raise LossError(f"{named.name} has no policy term: nothing is left to compare.")
    if reads - _HELD:
        raise LossError(
            f"{named.name} reads {', '.join(sorted(reads - _HELD))} besides the advantage, which no hook hands over."
        )
    return named


@dataclass(frozen=True)
class _Case:
    """A function beside a loss."""

    function: Callable[..., Any]
    loss: PolicyLoss
    how: Convention
    config: Any
    seed: int

    def like(self, loss: PolicyLoss) -> Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]:
        """fields -> (value, dL/dlogp) of a loss."""

        def evaluate(fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            logp = fields["logp"].detach().clone().requires_grad_()
            value = loss(Batch(**(fields | {"logp": logp}))).loss
            return value.detach(), torch.autograd.grad(value, logp)[0]

        return evaluate

    def theirs(self, fields: dict[str, Tensor], pieces: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor]:
        """(value, dL/dlogp) of the function, called once or on these pieces under the counts of the whole."""
        batch = Batch(**fields)
        weight, u, counts = self.loss.token_weights(batch), self.loss.mismatch(batch), self.loss.counts(batch)
        logp = fields["logp"].detach().clone().requires_grad_()
        total = torch.zeros((), dtype=logp.dtype)
        for rows in pieces or (torch.arange(len(logp)),):
            mine = {name: x[rows] for name, x in fields.items()} | {"logp": logp[rows]}
            given = Given(self.loss, mine, weight[rows], u[rows], counts, self.config)
            total = total + self._scalar(self.how.call(self.function, given))
        if not total.requires_grad:
            raise ProofError(f"{self.name} gives a number without a gradient: nothing would be learned from it.")
        grad = torch.autograd.grad(total, logp, allow_unused=True)[0]
        return total.detach().double(), torch.zeros_like(logp) if grad is None else grad

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def _scalar(self, made: Any) -> Tensor:
        if not isinstance(made, Tensor) or made.numel() != 1:
            what = f"a tensor of shape {list(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
            raise ProofError(f"{self.name} must give one number with a gradient, but gave {what}.")
        return made.reshape(())

    def fields(self, mask: Tensor, drift: float = 0.3, *, by_token: bool = False) -> dict[str, Tensor]:
        """A random batch with what this loss reads; every policy's log-probabilities are around the policy's."""
        generator = torch.Generator().manual_seed(self.seed)
        n, t = mask.shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        logp = -0.1 - 2 * torch.rand(n, t, generator=generator, dtype=torch.float64)
        per_row = normal(n) + 0.1
        fields = {"logp": logp, "mask": mask, "advantage": per_row if self.how.per_completion else _wide(per_row, t)}
        if by_token:
            fields["advantage"] = normal(n, t)
        for name in ("old_logp", "behavior_logp", "ref_logp"):
            other = (logp + drift * (normal(n, t) + 0.5 * normal(n, 1))).clamp(max=-1e-3)
            if name in self.loss.needs | {"old_logp"}:
                fields[name] = other
        if "entropy" in self.loss.needs:
            fields["entropy"] = normal(n, t).abs()
        if "truncated" in self.loss.needs:
            fields["truncated"] = torch.arange(n) % 4 == 3
        return fields

    def compare(self, what: str, fields: dict[str, Tensor], pieces: tuple[Tensor, ...] = ()) -> Comparison:
        ours = self.like(self.loss)(fields)
        return Comparison(self.name, self.how.name, self.loss, what, fields, ours, self.theirs(fields, pieces))


def _wide(x: Tensor, t: int) -> Tensor:
    return x[:, None].expand(-1, t).contiguous()


# -- the batches, in the order in which a difference is easiest to name ---------------------------------------------

_FULL = torch.ones(len(LENGTHS), WIDTH, dtype=torch.bool)


def _one_token(case: _Case) -> Iterator[Comparison]:
    """One completion of one token that did well, at ratio 1: what every loss makes more likely."""
    fields = case.fields(_FULL[:1, :1]) | {
        "advantage": torch.ones((1,) if case.how.per_completion else (1, 1)).double()
    }
    fields |= dict.fromkeys({"old_logp", "ref_logp", "behavior_logp"} & fields.keys(), fields["logp"])
    yield case.compare("a single token at ratio 1", fields)


def _curve(case: _Case) -> Iterator[Comparison]:
    """Completions of one token at many ratios, of either sign of the advantage: what the loss is made of."""
    if {"entropy", "truncated"} & case.loss.needs or not case.loss.separable:
        return  # what is kept depends on the other tokens
    n = 2 * len(CURVE)
    logp = torch.full((n, 1), -1.2, dtype=torch.float64)
    sign = torch.tensor([1.0, -0.5], dtype=torch.float64).repeat_interleave(len(CURVE))  # nothing cancels in the sum
    fields = {
        "logp": logp,
        "mask": torch.ones(n, 1, dtype=torch.bool),
        "old_logp": logp - CURVE.repeat(2)[:, None].log(),
    }
    fields["advantage"] = sign if case.how.per_completion else sign[:, None]
    for name in {"ref_logp", "behavior_logp"} & case.loss.needs:
        fields[name] = fields["old_logp"] if name == "behavior_logp" else logp
    yield case.compare("single tokens", fields)


def _rows(case: _Case) -> Iterator[Comparison]:
    for drift in DRIFTS:
        yield case.compare("rows without padding", case.fields(_FULL, drift))


def _on_policy(case: _Case) -> Iterator[Comparison]:
    fields = case.fields(_FULL)
    yield case.compare("the first update, at ratio 1", fields | {"old_logp": fields["logp"]})


def _by_token(case: _Case) -> Iterator[Comparison]:
    """An advantage for every token. What it means under one ratio a completion is a convention of its own."""
    if not case.how.per_completion and not case.loss.ratio_level.per_sequence:
        yield case.compare("advantages that differ within a row", case.fields(_FULL, by_token=True))


def _padding(case: _Case) -> Iterator[Comparison]:
    fields = case.fields(_ragged(LENGTHS))
    for name, x in fields.items():
        if x.is_floating_point() and x.shape == fields["mask"].shape:
            fields[name] = x * fields["mask"]
    yield case.compare("rows of different lengths", fields)


def _masked(case: _Case) -> Iterator[Comparison]:
    """Other numbers at masked positions must change nothing. Finite ones: NaN times 0 is NaN in most trainers."""
    fields = case.fields(_ragged(LENGTHS))  # what is drawn for them, where the batch before had zeros
    yield case.compare("other numbers at masked positions", fields)


def _empty(case: _Case) -> Iterator[Comparison]:
    lengths = (*LENGTHS[:2], 0, *LENGTHS[3:])
    yield case.compare("a row without a token", case.fields(_ragged(lengths)))


def _pieces(case: _Case) -> Iterator[Comparison]:
    """Micro-batches under the counts of the whole batch, as the trainer hands them over, add up to it."""
    if not case.how.whole and case.loss.separable:
        pieces = (torch.tensor([4, 0]), torch.tensor([2]), torch.tensor([1, 3, 5]))
        yield case.compare("micro-batches of 2, 1 and 3 rows", case.fields(_ragged(LENGTHS)), pieces)


def _ragged(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(WIDTH) < torch.tensor(lengths)[:, None]


_BATCHES = (_curve, _rows, _on_policy, _by_token, _padding, _masked, _empty, _pieces)

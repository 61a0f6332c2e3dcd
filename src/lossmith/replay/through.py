"""Recorded rollouts through a loss: what it would have said and pushed, at the policy that sampled. No model is loaded.

The pull of a token is -dL/dlogp: above 0, a step down the loss makes it more likely. What the file does not hold is
never guessed: a number that depends on it is None, and says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError, RunError, quiet_traps
from lossmith.losses import Batch, Loss, PolicyLoss
from lossmith.replay.recorded import Recorded

__all__ = ["FILLS", "Prepared", "Replay", "Replayed", "batch_of", "cosines", "prepare", "replay"]

_STANDS_IN = {"logp", "old_logp", "behavior_logp"}  # each stands in for the others: at the start of an update
FILLS = (-1.0, -2.5)  # nats, two stand-ins for log-probabilities that are not recorded: what differs depends on them


@dataclass(frozen=True, eq=False)
class Replayed:
    """One loss on one recorded step. None: it depends on what the file does not hold, or the loss was refused."""

    name: str
    loss: Loss
    refused: str = ""  # why it could not be evaluated
    notes: tuple[str, ...] = ()
    value: float | None = None
    advantage: Tensor | None = None  # [N, T]
    advantage_gap: float | None = None  # largest |advantage - recorded advantage| of a token
    pull: Tensor | None = None  # [N, T], -dL/dlogp
    clip_fraction: float | None = None  # share of tokens whose policy gradient was cut off

    @property
    def by_completion(self) -> Tensor | None:
        """[N], the pulls of a completion's tokens added up."""
        return None if self.pull is None else self.pull.sum(1)

    @property
    def without_pull(self) -> int | None:
        """Completions of which no token is pushed."""
        return None if self.pull is None else int((self.pull == 0).all(1).sum())


@dataclass(frozen=True, eq=False)
class Replay:
    """One recorded step through several losses."""

    record: Recorded
    losses: tuple[Replayed, ...]
    effective_sample_size: float | None  # share of the tokens, of the weights π_old / π_behavior
    under_model: Any = None  # replay.model.UnderModel, where a model was given
    evaluated: tuple[Replayed, ...] = field(init=False)  # those with a pull

    def __post_init__(self) -> None:
        object.__setattr__(self, "evaluated", tuple(x for x in self.losses if x.pull is not None))

    @property
    def cosines(self) -> Tensor:
        """[L, L] between the pulls of the evaluated losses, over all tokens."""
        return cosines([x.pull for x in self.evaluated if x.pull is not None])

    def against(self, name: str) -> list[float | None]:
        """Correlation over the completions of each evaluated loss's pull with a field ("reward"), or with "length"."""
        lengths = self.record.fields["mask"].sum(1).double()
        column = lengths if name == "length" else self.record.fields.get(name)
        if column is None:
            return [None] * len(self.evaluated)
        column = column if column.ndim == 1 else column.sum(1)
        return [_correlation(x.by_completion, column) for x in self.evaluated]


def replay(record: Recorded, losses: Sequence[Loss]) -> Replay:
    """The step through each loss. RunError: no loss is given."""
    if not losses:
        raise RunError("replaying takes at least one loss.")
    return Replay(record, tuple(_through(record, loss) for loss in losses), _sample_size(record.fields))


@dataclass(frozen=True)
class Prepared:
    """A loss as far as a record lets it be evaluated."""

    loss: Loss
    given: bool = False  # on the recorded advantages
    notes: tuple[str, ...] = ()
    refused: str = ""  # why it cannot be evaluated at all


def prepare(record: Recorded, loss: Loss) -> Prepared:
    """The loss without the terms that read what the record does not hold, as long as they are beside the policy's."""
    notes = []
    known = set(record.fields) | _STANDS_IN | ({"value"} if "old_value" in record.fields else set())
    if isinstance(loss, PolicyLoss):
        with quiet_traps():
            if loss.kl.in_loss and not loss.needs & {"ref_logp", "full_kl"} <= known:
                loss = loss.replace(beta=0.0)
                notes.append("without its KL term: the reference's log-probabilities are not recorded")
            if loss.entropy_coef and "entropy" not in known and "entropy" not in loss.replace(entropy_coef=0.0).needs:
                loss = loss.replace(entropy_coef=0.0)
                notes.append("without its entropy term: entropies are not recorded; it does not act through log p")
    lacking = sorted(loss.needs - known)
    given = "reward" in lacking and record.advantage is not None
    if given:  # the estimator is passed by, with what it reads
        lacking = sorted(_needs_of_objective(loss) - known - {"advantage"})
        notes.append("on the recorded advantages: rewards are not recorded")
    refused = f"it reads {', '.join(lacking)}, which the file does not hold" if lacking else ""
    return Prepared(loss, given, tuple(notes), refused)


def _through(record: Recorded, loss: Loss) -> Replayed:
    name, ready = loss.name, prepare(record, loss)
    loss, notes = ready.loss, ready.notes
    if ready.refused:
        return Replayed(name, loss, ready.refused, notes)
    seen: list[tuple[Any, Tensor]] = []
    for fill in FILLS:
        try:
            seen.append(_evaluate(record, loss, fill, ready.given))
        except LossError as error:
            return Replayed(name, loss, str(error), notes)
    (out, pull), (other, other_pull) = seen
    value = float(out.loss.detach())
    gives = isinstance(loss, PolicyLoss) and loss.advantage.acts
    gap = float((out.advantage - record.advantage).abs().max()) if gives and record.advantage is not None else None
    return Replayed(
        name, loss, "", notes,
        value=value if value == float(other.loss.detach()) else None,
        advantage=out.advantage,
        advantage_gap=gap,
        pull=pull if torch.equal(pull, other_pull) else None,
        clip_fraction=out.metrics.get("clip_fraction"),
    )  # fmt: skip


def _needs_of_objective(loss: Loss) -> frozenset[str]:
    return loss.replace(advantage="given", advantage_scale="none").needs if isinstance(loss, PolicyLoss) else loss.needs


def batch_of(record: Recorded, fill: float, given: bool = False) -> tuple[Batch, Tensor]:
    """(batch, its logp [N, T], a leaf): at the policy that the update began with, or the nearest that is recorded.

    fill: what stands for log-probabilities where none are recorded. given: on the recorded advantages.
    """
    fields = dict(record.fields)
    base = fields.pop("logp", fields.get("old_logp", fields.get("behavior_logp")))
    if base is None:  # different at every token, so that no mean or difference hides that they are made up
        count = torch.arange(fields["mask"].numel(), dtype=torch.float64)
        base = (fill * (1.5 + torch.sin(fill * count))).view(fields["mask"].shape)
    logp = base.clone().requires_grad_()
    for name in ("old_logp", "behavior_logp"):
        fields.setdefault(name, logp.detach())
    if given and record.advantage is not None:
        fields["advantage"] = record.advantage
    if "old_value" in fields:
        fields.setdefault("value", fields["old_value"])
    return Batch(**(fields | {"logp": logp})), logp


def _evaluate(record: Recorded, loss: Loss, fill: float, given: bool) -> tuple[Any, Tensor]:
    """(output, pull)."""
    batch, logp = batch_of(record, fill, given)
    out = loss(batch)
    grad = torch.autograd.grad(out.loss, logp, allow_unused=True)[0] if out.loss.requires_grad else None
    return out, torch.zeros_like(logp) if grad is None else -grad


def _sample_size(fields: dict[str, Tensor]) -> float | None:
    """(Σw)² / (n Σw²) of the tokens' weights π_old / π_behavior: 1 where sampler and learner agree."""
    if not {"old_logp", "behavior_logp"} <= set(fields):
        return None
    weight = (fields["old_logp"] - fields["behavior_logp"]).exp()[fields["mask"]]
    return float(weight.sum() ** 2 / (len(weight) * (weight * weight).sum()))


def _correlation(x: Tensor | None, y: Tensor) -> float | None:
    """Pearson's r over the completions; None where either does not vary."""
    if x is None or len(x) < 3:
        return None
    x, y = x - x.mean(), y.double() - y.double().mean()
    length = float(x.norm() * y.norm())
    return float((x * y).sum()) / length if length > 0 else None


def cosines(vectors: Sequence[Tensor]) -> Tensor:
    """[L, L]; 0 where a vector is 0."""
    if not vectors:
        return torch.zeros(0, 0, dtype=torch.float64)
    flat = torch.stack([v.flatten().double() for v in vectors])
    flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return flat @ flat.T

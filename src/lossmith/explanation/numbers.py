"""The numbers of a whole step, [N, T], known ones only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lossmith.errors import RunError, quiet_traps
from lossmith.losses import Batch, Loss
from lossmith.losses.anatomy import Anatomy, Link, Pull
from lossmith.losses.batch import FIELDS
from lossmith.replay.recorded import Recorded
from lossmith.replay.through import FILLS, Prepared, batch_of

__all__ = ["Numbers", "numbers_of"]

_POLICIES = {
    "old_logp": "log π_old",
    "behavior_logp": "log π_behavior, under what really sampled",
    "ref_logp": "log π_ref",
}
_BESIDE = {
    "entropy": "−dL/dH: the entropy term acts through the entropy at this position",
    "full_kl": "−dL/dKL: the KL term acts through the KL over the whole vocabulary",
    "value": "−dL/dV: the critic's own, through its value before the token",
}


@dataclass(frozen=True, eq=False)
class Numbers:
    """NaN: it depends on what was not recorded."""

    credit: tuple[Link, ...]
    policies: tuple[Link, ...]
    ratio: tuple[Link, ...]
    pulls: tuple[Pull, ...]
    beside: tuple[Link, ...]
    pull: Tensor  # [N, T], what the chain adds up to
    applied: Tensor  # [N, T], -dL/dlogp by autograd

    @property
    def gap(self) -> float | None:
        """Largest |chain - applied| of a token."""
        gaps = (self.pull - self.applied).abs()
        return None if bool(gaps.isnan().any()) else float(gaps.max())


def _logp_words(record: Recorded) -> str:
    if "logp" in record.fields:
        return "log π_θ, under the model that was named"
    if "old_logp" in record.fields:
        return "log π_θ, where the update began"
    return "log π_θ, for which the sampler's stands in" if "behavior_logp" in record.fields else "log π_θ"


def numbers_of(record: Recorded, ready: Prepared) -> Numbers:
    """The step's numbers through a loss. What a stand-in for missing log-probabilities changes is not known."""
    if ready.refused:
        raise RunError(f"{ready.loss.name} cannot be explained on {record.place}: {ready.refused}.")
    with quiet_traps():
        first, other = (_evaluated(ready.loss, *batch_of(record, fill, ready.given)) for fill in FILLS)
    policies = tuple(
        Link(name, record.fields[name], words) for name, words in _POLICIES.items() if name in record.fields
    )
    logp = replace(_known(first.policies[0], other.policies[0]), words=_logp_words(record))
    policies = (logp, *policies)
    return Numbers(
        _all_known(first.credit, other.credit),
        policies,
        _all_known(first.ratio, other.ratio),
        tuple(_known_pull(a, b) for a, b in zip(first.pulls, other.pulls, strict=True)),
        _all_known(first.beside, other.beside),
        _where_equal(first.pull, other.pull),
        _where_equal(first.applied, other.applied),
    )


def _evaluated(loss: Loss, batch: Batch, logp: Tensor) -> Numbers:
    leaves = {"logp": logp}
    for name in _BESIDE:
        if (given := getattr(batch, name)) is not None and FIELDS[name].gradient:
            leaves[name] = given.detach().clone().requires_grad_()
    whole = batch.replace(**{name: leaf for name, leaf in leaves.items() if name != "logp"})
    total = loss(whole).loss
    grads = (
        torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        if total.requires_grad
        else [None] * len(leaves)
    )
    applied = {n: -g if g is not None else torch.zeros_like(logp) for n, g in zip(leaves, grads, strict=True)}
    anatomy: Anatomy = loss.anatomy(batch)
    beside = tuple(Link(name, applied[name], _BESIDE[name]) for name in applied.keys() - {"logp"})
    pull = torch.zeros_like(logp)
    for one in anatomy.pulls:
        pull = pull + one.value
    policies = (Link("logp", logp.detach()),)
    beside = tuple(link for link in beside if bool(link.value.any()))
    return Numbers(
        anatomy.credit, policies, anatomy.ratio, anatomy.pulls, beside, pull.detach(), applied["logp"].detach()
    )


def _where_equal(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == b, a, torch.nan)


def _known(a: Link, b: Link) -> Link:
    return replace(a, value=_where_equal(a.value.detach(), b.value.detach()))


def _all_known(a: tuple[Link, ...], b: tuple[Link, ...]) -> tuple[Link, ...]:
    return tuple(_known(x, y) for x, y in zip(a, b, strict=True))


def _known_pull(a: Pull, b: Pull) -> Pull:
    share = None if a.share is None or b.share is None else _where_equal(a.share, b.share)
    return replace(a, factors=_all_known(a.factors, b.factors), share=share)

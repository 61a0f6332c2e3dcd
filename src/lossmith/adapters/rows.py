"""What every hook has in common: credit from the fields that a trainer gives, and the objective on some of the rows.

A hook that carries tensors with their rows takes the whole credit along. Through the others only an advantage comes
back: there the objective half runs on advantages that are given, and 1/Z is made of the trainer's counts, or is a
factor of the advantage (which is right where the loss is homogeneous in A).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lossmith.adapters.hooks import Hook
from lossmith.errors import LossError, nearest, quiet_traps
from lossmith.losses import KL, Batch, Normalizer, PolicyLoss, parse_loss
from lossmith.losses.catalogue.user import from_function
from lossmith.losses.loss import Loss, LossOutput

__all__ = [
    "advantages", "check_estimator", "credit_of", "given_loss", "groups", "objective", "objective_half", "padded",
    "wide",
]  # fmt: skip


def given_loss(spec: Any) -> Loss:
    """The loss that was asked for: a Loss, a name, "name@library", "name(parameter=value)", a table, or a function."""
    return from_function(spec).build() if callable(spec) and not isinstance(spec, Loss) else parse_loss(spec)


def wide(x: Tensor) -> Tensor:
    """float32, or float64 where it is that: what losses are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def groups(prompts: Any) -> Tensor:
    """[N] int: prompts numbered, from whatever names them."""
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(prompt, len(numbers)) for prompt in list(prompts)], dtype=torch.int64)


def padded(rows: list[Tensor], fill: float = 0.0) -> Tensor:
    """Rows of several lengths as one tensor [N, T], gradients kept."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)


# -- credit ----------------------------------------------------------------------------------------------------------


def credit_of(loss: Loss, batch: Batch) -> tuple[Tensor, Tensor]:
    """(A, 1/Z) of the whole batch, [N, T] each. What compares old policy and sampler is made beside the objective."""
    with quiet_traps():  # they were told when the loss was built
        made = (loss.replace(mismatch="none") if isinstance(loss, PolicyLoss) else loss).credit(batch)
    return made.advantage, made.weight


def advantages(hook: Hook, loss: Loss, batch: Batch, unit: Tensor | float | None = None) -> Tensor:
    """Advantages [N, T] as the hook is to be given them: where they carry 1/Z, over `unit`, which the trainer's 1/Z is.

    unit: 1/tokens if not given.
    """
    advantage, weight = credit_of(loss, batch)
    if not isinstance(loss, PolicyLoss) or not hook.folds(loss):
        return advantage
    each = torch.as_tensor(1 / max(batch.tokens, 1) if unit is None else unit, dtype=weight.dtype, device=weight.device)
    return advantage * torch.where(each > 0, weight / torch.where(each > 0, each, 1.0), 0.0)


def check_estimator(hook: Hook, loss: Loss, name: str, known: Mapping[str, tuple[str, str]]) -> None:
    """LossError where the trainer makes the advantages, and not those that the loss wants.

    name: the trainer's estimator. known: {its name: (advantage, advantage_scale) of the same thing here}.
    """
    if not isinstance(loss, PolicyLoss) or not hook.trainers_estimator(loss) or loss.advantage.option == "given":
        return
    if name not in known:
        raise LossError(f"{hook.name} has no estimator {name!r}.{nearest(name, known)}")
    wanted = (loss.advantage.option, loss.advantage_scale.option)
    if known[name] != wanted:
        same = [theirs for theirs, ours in known.items() if ours == wanted]
        cure = f"its {same[0]!r} is" if same else "it has none that is"
        mine = "advantage='{}', advantage_scale='{}'"
        raise LossError(
            f"{loss.name} wants {mine.format(*wanted)}, and {hook.name} makes the advantages itself: {name!r} is "
            f"{mine.format(*known[name])}; {cure} the one. Or build the loss with {mine.format(*known[name])}."
        )


# -- objective -------------------------------------------------------------------------------------------------------


def objective_half(hook: Hook, loss: Loss) -> Loss:
    """The loss as its objective half runs in this hook: on advantages that are given, under the trainer's 1/Z.

    A local normalizer means all rows of an update here, as it does in Lossmith's own loop.
    """
    if not isinstance(loss, PolicyLoss):
        return loss
    changes: dict[str, Any] = {"local_normalizer": False}
    if hook.weights in ("scaled", "tokens"):
        changes["aggregate"] = "token_sum"
    elif hook.carries == "advantage" and hook.folds(loss):
        changes["aggregate"] = "token_mean"
    if hook.own_credit or not hook.makes_own_credit(loss):
        changes |= {"shaping": (), "group_filter": "none", "truncated": "keep"}
        changes |= {"advantage": "given", "advantage_scale": "none"} if loss.advantage.acts else {}
        changes |= {"kl": KL()} if loss.kl.in_reward else {}
    with quiet_traps():
        return loss.replace(**changes)


def objective(
    half: Loss,
    batch: Batch,
    normalizer: Normalizer | None = None,
    weight: Tensor | None = None,
    mismatch: Tensor | None = None,
) -> LossOutput:
    """The objective on these rows.

    normalizer: counts over the whole update, so that rows add up to it. weight: 1/Z as the credit half made it, [N, T].
    mismatch: what the trainer itself multiplies the policy term of each token with, [N, T].
    """
    credit = half.credit(batch, normalizer if isinstance(half, PolicyLoss) else None)
    if weight is not None:
        credit = dataclasses.replace(credit, weight=weight)
    if mismatch is not None:
        own = credit.mismatch  # there, since these rows have their log-probabilities
        credit = dataclasses.replace(credit, mismatch=mismatch if own is None else own * mismatch)
    return half.objective(batch, credit)

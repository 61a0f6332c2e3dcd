"""Checks of the form: repeatable, without side effects, readable, and the same after it was written down."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossmith.errors import quiet_traps
from lossmith.proofs.finding import FAILED, Finding, gap, judged, not_applicable
from lossmith.proofs.invariances import untouched
from lossmith.proofs.random_batches import evaluate, make, random_fields

__all__ = ["deterministic", "inputs_untouched", "reward_scale", "reward_shift", "round_trip"]


def deterministic(loss: Any, seed: int) -> Finding:
    """Twice the same batch, twice the same number, whatever the global generator holds."""
    fields = random_fields(loss, seed)
    first = evaluate(loss, fields)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed + 12345)
        second = evaluate(loss, fields)
    finally:
        torch.set_rng_state(state)
    same = torch.equal(first.value, second.value)
    same &= all(torch.equal(first.gradients[k], second.gradients[k]) for k in first.gradients)
    return judged("deterministic", float(not same), 0.0, "1 if a second evaluation gives another number")


def inputs_untouched(loss: Any, seed: int) -> Finding:
    """The batch and its tensors hold the same numbers afterwards."""
    fields = random_fields(loss, seed)
    kept = {k: v.clone() for k, v in fields.items()}
    leaves, batch = make(fields)
    loss(batch).loss.backward()
    changed = not untouched(kept, batch) or not all(torch.equal(fields[k], kept[k]) for k in kept)
    changed |= any(not torch.equal(leaf.detach(), kept[name]) for name, leaf in leaves.items())
    return judged("inputs_untouched", float(changed), 0.0, "1 if the batch changed")


def round_trip(loss: Any, seed: int) -> Finding:
    """from_dict(to_dict()) is the same loss."""
    read = getattr(type(loss), "from_dict", None)
    if read is None or not hasattr(loss, "to_dict"):
        return not_applicable("round_trip", "the loss is not written as flat parameters")
    with quiet_traps():
        again = read(loss.to_dict())
    fields = random_fields(loss, seed)
    a, b = evaluate(loss, fields), evaluate(again, fields)
    number = max(gap(a.value, b.value), *(gap(a.gradients[k], b.gradients[k]) for k in a.gradients))
    if again.to_dict() != loss.to_dict():
        return Finding("round_trip", FAILED, number, "the parameters differ after a round trip")
    return judged("round_trip", number, 0.0, "written as flat parameters and read back")


def reward_shift(loss: Any, seed: int) -> Finding:
    """R + c, one c for each prompt: is the advantage the same? Measured; a check where the estimator promises it."""
    return _invariance(loss, seed, "reward_shift", "shift_invariant", lambda r, g: r + 0.7 + 0.3 * g.to(r.dtype))


def reward_scale(loss: Any, seed: int) -> Finding:
    """3·R: is the advantage the same? Measured; a check where the estimator or its scale promises it."""
    return _invariance(loss, seed, "reward_scale", "scale_invariant", lambda r, g: 3 * r)


def _invariance(loss: Any, seed: int, check: str, promise: str, change: Any) -> Finding:
    fields = random_fields(loss, seed)
    if "reward" not in fields:
        return not_applicable(check, "the loss reads no reward")
    number = gap(_credit(loss, fields), _credit(loss, fields | {"reward": change(fields["reward"], fields["group"])}))
    estimator, scale = getattr(loss, "advantage", None), getattr(loss, "advantage_scale", None)
    mine, its = (getattr(owner, promise, False) is True for owner in (estimator, scale))
    # a shift must leave both alone; a factor must come through the estimator for the scale to take it out
    promised = (
        mine and its if promise == "shift_invariant" else mine or (its and getattr(estimator, "homogeneous", True))
    )
    kl = getattr(loss, "kl", None)
    in_reward = kl is not None and kl.in_reward
    if promised and not getattr(loss, "shaping", ()) and not in_reward:
        return judged(check, number, 3e-3, "promised by its pieces; relative change of the advantage")
    return not_applicable(check, "not promised; measured relative change of the advantage", number)


def _credit(loss: Any, fields: dict[str, Tensor]) -> Tensor:
    """The advantage [N, T]; where there is none, dL/dlogp."""
    found = evaluate(loss, fields)
    advantage = getattr(found.output, "advantage", None)
    return advantage if isinstance(advantage, Tensor) else found.gradients["logp"]

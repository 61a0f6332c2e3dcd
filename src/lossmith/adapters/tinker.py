"""Lossmith's losses on Tinker (0.38 or newer): `TrainingClient.forward_backward_custom`.

    from lossmith.adapters.tinker import loss_fn
    future = training_client.forward_backward_custom(data, loss_fn("dppo_tv", reward=rewards, group=prompts))

The whole update comes at once, so every loss that needs log-probabilities alone comes through, DPO and its kin too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lossmith.adapters.hooks import HOOKS
from lossmith.adapters.rows import given_loss, padded, wide
from lossmith.errors import LossError
from lossmith.losses import Batch
from lossmith.losses.batch import FIELDS

__all__ = ["loss_fn"]

HOOK = HOOKS["tinker"]
_NAMED = {"logprobs": "behavior_logp", "old_logprobs": "old_logp", "ref_logprobs": "ref_logp"}


def loss_fn(loss: Any, **fields: Any) -> Callable[[list[Any], list[Tensor]], tuple[Tensor, dict[str, float]]]:
    """The loss as `forward_backward_custom` calls it: fn(data, logprobs_list) -> (loss, metrics).

    fields: those of Batch, one entry for each datum, in the order of `data`: a number (reward, group, ...), or the
    numbers of its tokens (ref_logp, ...), as long as its target_tokens. What a datum's loss_fn_inputs hold is read from
    there: mask (or weights, not 0), logprobs (the sampler's), advantages are not: credit is the loss's own.
    The old policy is the sampler's where old_logp is not given. LossError: the hook does not carry the loss, a field is
    missing, or there is none of that name.
    """
    made = given_loss(loss)
    HOOK.check(made)
    for name in fields:
        if name not in FIELDS or name in ("logp", "mask"):
            raise LossError(f"{made.name}: {name} is no field that can be given here.")

    def call(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        found = made(_batch(data, logprobs_list, fields))
        return found.loss, dict(found.metrics)

    return call


def _batch(data: list[Any], logprobs: list[Tensor], fields: dict[str, Any]) -> Batch:
    given: dict[str, Any] = {"logp": padded([wide(x) for x in logprobs]), "mask": padded([_mask(d) for d in data]) > 0}
    for theirs, ours in _NAMED.items():
        if data and all(theirs in datum.loss_fn_inputs for datum in data):
            given[ours] = padded([_numbers(datum.loss_fn_inputs[theirs]) for datum in data])
    for name, rows in fields.items():
        if len(rows) != len(data):
            raise LossError(f"{name} has {len(rows)} entries for {len(data)} data.")
        by_token = bool(len(rows)) and isinstance(rows[0], (list, tuple, Tensor)) and FIELDS[name].shapes != ("NK",)
        given[name] = padded([_numbers(row) for row in rows]) if by_token else rows
    if "old_logp" not in given and "behavior_logp" in given:
        given["old_logp"] = given["behavior_logp"]
    return Batch(**given)


def _mask(datum: Any) -> Tensor:
    inputs = datum.loss_fn_inputs
    for name in ("mask", "weights"):
        if name in inputs:
            return (_numbers(inputs[name]) != 0).float()
    return torch.ones(len(_numbers(inputs["target_tokens"])))


def _numbers(x: Any) -> Tensor:
    """A Tensor, tinker's TensorData or a list as a tensor of numbers."""
    x = x.to_torch() if hasattr(x, "to_torch") else x
    return wide(x) if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)

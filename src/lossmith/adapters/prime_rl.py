"""Lossmith's losses inside prime-rl: its custom loss.

    [trainer.loss]
    type = "custom"
    import_path = "lossmith.adapters.prime_rl.loss_fn"
    kwargs = { loss = "dppo_tv", algorithm = "grpo" }

One completion at a time; the policy that sampled is the old policy, and the trainer divides by the number of tokens.
"""

from __future__ import annotations

import functools
import importlib
import json
from typing import Any

import torch

from lossmith.adapters.hooks import HOOKS
from lossmith.adapters.rows import check_estimator, given_loss, objective, objective_half, wide
from lossmith.losses import Batch, Loss

__all__ = ["ALGORITHMS", "loss_fn"]

HOOK = HOOKS["prime_rl"]
ALGORITHMS = {"grpo": ("group", "none"), "max_rl": ("maxrl", "none")}  # -> (advantage, advantage_scale)


@functools.lru_cache(maxsize=16)
def _half(spec: Any, algorithm: str) -> Loss:
    loss = given_loss(json.loads(spec) if isinstance(spec, str) and spec.startswith("{") else spec)
    HOOK.check(loss)
    check_estimator(HOOK, loss, algorithm, ALGORITHMS)
    return objective_half(HOOK, loss)


def loss_fn(inputs: Any, loss: Any, algorithm: str = "grpo", outputs: Any = None) -> Any:
    """LossInputs of one completion, [T] each -> LossOutputs(sum over its tokens, metrics).

    loss: as everywhere. algorithm: prime-rl's, which makes the advantages; checked against the loss's own.
    outputs: another class than prime-rl's LossOutputs.
    LossError: the hook does not carry the loss, or the advantages are not those that it wants.
    """
    given = {
        "logp": inputs.trainer_logprobs, "old_logp": inputs.inference_logprobs,
        "behavior_logp": inputs.inference_logprobs, "ref_logp": inputs.ref_logprobs, "advantage": inputs.advantages,
        "teacher_logp": inputs.ref_logprobs,  # whichever model its algorithm lets score the tokens
    }  # fmt: skip
    mask = inputs.loss_mask.bool()[None]
    batch = Batch(mask=mask, **{name: wide(x)[None] for name, x in given.items() if x is not None})
    weight = mask.to(batch.dtype)
    if inputs.loss_weights is not None:
        weight = weight * inputs.loss_weights[None]
    spec = json.dumps(loss) if isinstance(loss, dict) else loss  # a table of the TOML is no key
    found = objective(_half(spec, algorithm), batch, weight=weight)
    metrics = {f"lossmith/{key}": torch.tensor(value) for key, value in found.metrics.items()}
    if outputs is None:
        outputs = importlib.import_module("prime_rl.trainer.rl.loss").LossOutputs
    return outputs(loss=found.loss, metrics=metrics)

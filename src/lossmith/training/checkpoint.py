"""A learner's state in a checkpoint: weights, optimizer, the loss with what in it has moved.

Random numbers are keyed by (seed, step, prompt, sample) and prompts by (seed, step), so neither has state to save.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lossmith.durable.checkpoint import Checkpoint, optimizer_state, save
from lossmith.durable.parts import SavedTensors
from lossmith.errors import RunError
from lossmith.losses import loss_from_dict
from lossmith.training.learner import Learner
from lossmith.training.shards import named_weights, of_optimizer, read_state

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(
    folder: Path, learner: Learner, step: int, metrics: str = "", more: Mapping[str, Any] | None = None
) -> Checkpoint:
    """The state after `step` finished steps, with the lines of metrics.jsonl up to it and what else the loop keeps."""
    tensors, numbers = optimizer_state(learner.optimizer)
    state = {
        "step": step,
        "policy_version": learner.policy.version,
        "loss": learner.loss.to_dict(),
        "bad_in_a_row": learner.bad_in_a_row,
        "optimizer": numbers,
        **(more or {}),
    }
    texts = {"state.json": json.dumps(state), "metrics.jsonl": metrics}
    if learner.shards is not None:
        return save(folder, step, {}, texts, learner.shards.write)
    return save(folder, step, {"weights": dict(named_weights(learner.policy)), "optimizer": tensors}, texts)


def load_checkpoint(found: Checkpoint, learner: Learner, changed: Collection[str] = ()) -> dict[str, Any]:
    """Put the saved state into the learner and its policy, whatever number of ranks wrote it; what state.json holds.

    changed: settings that are to be the recipe's from here on, not what they were when this was saved.
    RunError: it is damaged, or of another model.
    """
    found.check()
    state, saved = found.state(), SavedTensors(found.path)
    theirs = {name: kind for name, kind in saved.kinds.items() if not of_optimizer(name)}
    ours = {name: (x.shape, x.dtype) for name, x in named_weights(learner.policy)}
    if {name: shape for name, (shape, _) in theirs.items()} != {name: shape for name, (shape, _) in ours.items()}:
        raise RunError(
            f"{found.path} was written for another model: its tensors are not this policy's. Put the model, and a loss "
            "with the same parts, back into the recipe."
        )
    if theirs != ours:
        raise RunError(
            f"{found.path} holds weights and optimizer state of another type than this recipe's: put the setting "
            "weights back to what it was."
        )
    if learner.shards is not None:
        learner.shards.read(found.path, state["optimizer"], state["policy_version"])
    else:
        read_state(saved, learner.policy, learner.optimizer, state["optimizer"])
        learner.policy.version = state["policy_version"]
    learner.bad_in_a_row = state["bad_in_a_row"]
    if "loss" not in changed:
        learner.loss = loss_from_dict(state["loss"])
    return state

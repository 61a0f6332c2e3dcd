"""Checkpoints: the whole state of a run, as safetensors and JSON, complete or absent.

A checkpoint is written beside its final name, synced, listed in a manifest with sizes and hashes, and renamed once.
Random numbers are keyed by (seed, step, prompt, sample) and prompts by (seed, step), so neither has state to save.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lossmith.errors import RunError
from lossmith.losses import loss_from_dict
from lossmith.rewards.seal import sha256
from lossmith.training.learner import Learner

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]


def save_checkpoint(folder: Path, learner: Learner, step: int) -> Path:
    """Write checkpoints/step-NNNNN: the state after `step` finished steps. The one before it is deleted afterwards."""
    target = folder / "checkpoints" / f"step-{step:05d}"
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    policy = learner.policy
    save_file(_contiguous(dict(_weights(learner))), partial / "weights.safetensors")
    tensors, numbers = _optimizer_state(learner)
    save_file(_contiguous(tensors), partial / "optimizer.safetensors")
    state = {
        "step": step,
        "policy_version": policy.version,
        "loss": learner.loss.to_dict(),
        "optimizer": numbers,
    }
    (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    _write_manifest(partial)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    _sync(target.parent)
    for older in _complete(folder):
        if older.name < target.name:
            shutil.rmtree(older)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose manifest holds, or None."""
    complete = [c for c in _complete(folder) if _verified(c)]
    return max(complete, default=None)


def load_checkpoint(path: Path, learner: Learner) -> dict[str, Any]:
    """Put the saved state into the learner and its policy; returns what state.json holds."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    saved = load_file(path / "weights.safetensors")
    current = dict(_weights(learner))
    if saved.keys() != current.keys():
        raise RunError(f"{path} was written for another model: its tensors are not this policy's.")
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(saved[name])
    learner.policy.version = state["policy_version"]
    learner.loss = loss_from_dict(state["loss"])
    _restore_optimizer(learner, load_file(path / "optimizer.safetensors"), state["optimizer"])
    return state


def _weights(learner: Learner) -> list[tuple[str, torch.Tensor]]:
    named = [("policy." + n, p.detach()) for n, p in learner.policy.model.named_parameters()]
    head = learner.policy.value_head
    return named + ([] if head is None else [("value_head." + n, p.detach()) for n, p in head.named_parameters()])


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _optimizer_state(learner: Learner) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    state = learner.optimizer.state_dict()
    tensors = {f"{i}.{key}": value for i, entry in state["state"].items() for key, value in entry.items()}
    return tensors, {"param_groups": state["param_groups"]}


def _restore_optimizer(learner: Learner, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    learner.optimizer.load_state_dict({"state": state, "param_groups": numbers["param_groups"]})


# -- all or nothing ---------------------------------------------------------------------------------------------------


def _write_manifest(folder: Path) -> None:
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps(files, indent=2), encoding="utf-8")
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _verified(folder: Path) -> bool:
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return all(sha256(folder / name) == entry["sha256"] for name, entry in files.items())
    except (OSError, ValueError):
        return False


def _complete(folder: Path) -> list[Path]:
    return [p for p in sorted((folder / "checkpoints").glob("step-*")) if not p.name.endswith(".partial")]


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle of a folder to flush
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""An adapter and its base model as one plain folder, which every program loads that loads models."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lossmith.errors import PolicyError
from lossmith.files import at_home, explain_write_errors, sync
from lossmith.policy.folder import adapter_base, check_model
from lossmith.policy.reading import load_policy

__all__ = ["merge_adapter"]


def merge_adapter(folder: str | Path, output: str | Path) -> Path:
    """Write a LoRA adapter and its base model as one model folder, in float32; returns that folder.

    folder: the adapter's, or that of a run, whose policy/ is meant. output: a new folder. PolicyError: it is no
    adapter, or does not fit its base model; RunError: the folder cannot be written.
    """
    place = at_home(folder, PolicyError)
    if (place / "recipe.toml").is_file():
        place /= "policy"
    check_model(place)
    if adapter_base(place) is None:
        raise PolicyError(f"{str(place)!r} is a whole model already: there is no adapter to merge into it.")
    target = at_home(output, PolicyError)
    if os.path.lexists(target):
        raise PolicyError(f"{str(output)!r} exists, and is not overwritten. Choose another folder.")
    policy = load_policy(place, device="cpu", dtype="float32", trainable=False)
    assert policy.adapter is not None
    policy.model, policy.adapter = policy.adapter.merged(), None
    partial = target.with_name(target.name + ".partial")
    try:
        with explain_write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            policy.save(partial)
            for file in partial.iterdir():
                sync(file)
            os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target

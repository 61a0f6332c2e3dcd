"""A model that ranks hold in parts, written as one folder, file by file: no rank ever holds more of it than a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lossmith.files import in_groups

__all__ = ["Gather", "save_in_files"]

Gather = Callable[[Callable[[str, Tensor], None]], None]  # hands over each tensor of a model's state, whole, by name

FILE_BYTES = 4 * 2**30  # a model of that size, or smaller, is one file


def save_in_files(model: Any, folder: Path, gather: Gather) -> None:
    """As `save_pretrained` writes it; of several files, which holds which weight is in model.safetensors.index.json."""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(x), name) for name, x in state.items()}  # a head may be the embedding too
    if getattr(model, "_weight_conversions", None):
        # transformers put weights together when it read them, and takes them apart again: it needs all at once
        whole: dict[str, Tensor] = {}
        gather(whole.__setitem__)
        model.save_pretrained(folder, state_dict={name: whole[main] for name, main in same.items()})
        return
    left_out = set(model._keys_to_ignore_on_save or ())
    sizes = {n: x.numel() * x.element_size() for n, x in state.items() if same[n] == n and n not in left_out}
    groups = in_groups(sizes, FILE_BYTES)
    names = [f"model-{k:05d}-of-{len(groups):05d}.safetensors" for k in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else ["model.safetensors"]
    place = {weight: (name, set(group)) for name, group in zip(names, groups, strict=True) for weight in group}
    held: dict[str, Tensor] = {}

    def take(weight: str, x: Tensor) -> None:
        if weight not in place:
            return
        held[weight] = x.contiguous()
        name, group = place[weight]
        if held.keys() == group:
            save_file(held, folder / name, metadata={"format": "pt"})
            held.clear()

    model.save_pretrained(folder, state_dict={})  # its configuration
    gather(take)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": {w: n for w, (n, _) in place.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

"""Checkpoints: a whole state as safetensors, JSON and text, complete or absent, and never a damaged one for a good one.

A checkpoint is written beside its final name, listed in a manifest with the hash of every file, flushed, and renamed
once. The last two are kept. A checkpoint is checked against its manifest before it is loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lossmith.errors import RunError
from lossmith.files import explain_write_errors, sha256, sync

__all__ = [
    "Checkpoint",
    "Entries",
    "Pace",
    "clean",
    "flush",
    "listed",
    "newest",
    "optimizer_state",
    "remove",
    "restore_optimizer",
    "save",
]

Tensors = Mapping[str, torch.Tensor]
Entries = Mapping[str, Mapping[str, Any]]  # of a manifest: what is said of each file
SHARE = 0.03  # of the time, that saving may take
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` finished steps. Made by `newest`."""

    path: Path
    step: int

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Of NAME.safetensors."""
        return load_file(self.path / f"{name}.safetensors")

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.text("state.json"))
        return state

    def text(self, name: str) -> str:
        return (self.path / name).read_bytes().decode("utf-8")

    def damage(self) -> str:
        """What is wrong with its files ("weights.safetensors is damaged"), or ""."""
        try:
            entries = json.loads((self.path / MANIFEST).read_bytes())
            hashes = {str(name): str(entry["sha256"]) for name, entry in entries.items()}
        except FileNotFoundError:
            return f"{MANIFEST} is missing"
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return f"{MANIFEST} is damaged"
        files = {p.name for p in self.path.iterdir()} - {MANIFEST}
        if "state.json" not in hashes or files - hashes.keys():  # an empty list would pass any file
            return f"{MANIFEST} is damaged: it does not list {', '.join(sorted(files - hashes.keys())) or 'its files'}"
        missing = next((name for name in hashes if name not in files), None)
        if missing is not None:
            return f"{missing} is missing"
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda name: sha256(self.path / name), hashes)
            wrong = [name for name, is_now in zip(hashes, found, strict=True) if is_now != hashes[name]]
        return f"{wrong[0]} is damaged" if wrong else ""

    def check(self) -> None:
        """RunError: it is damaged."""
        problem = self.damage()
        if problem:
            raise RunError(f"the checkpoint {str(self.path)!r} cannot be used: {problem}.")


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensors],
    texts: Mapping[str, str],
    parts: Callable[[Path], Entries] | None = None,
) -> Checkpoint:
    """Write checkpoints/step-NNNNN in `folder`: {name: tensors} as safetensors, {file name: text} beside them.

    parts: has what other processes hold written into the folder it is given, and says of which files.
    The one before it stays, older ones go. RunError: it cannot be written, and then nothing of it is left.
    """
    target = folder / "checkpoints" / f"step-{step:05d}"
    partial = target.with_name(target.name + ".partial")
    remove(partial)
    try:
        with explain_write_errors(target):
            partial.mkdir(parents=True)
            theirs = {} if parts is None else parts(partial)
            for name, several in tensors.items():
                contiguous = {key: tensor.contiguous() for key, tensor in several.items()}
                save_file(contiguous, partial / f"{name}.safetensors")
            for name, text in texts.items():
                (partial / name).write_bytes(text.encode())
            ours = listed(sorted(p for p in partial.iterdir() if p.name not in theirs))
            (partial / MANIFEST).write_bytes(json.dumps({**ours, **theirs}, indent=2).encode())
            sync(partial / MANIFEST)
            sync(partial)
            remove(target)
            os.rename(partial, target)
            sync(target.parent)
            for older in _all(folder)[2:]:
                remove(older.path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Checkpoint(target, step)


def newest(folder: Path) -> tuple[Checkpoint | None, list[tuple[Checkpoint, str]]]:
    """(the newest that is whole, the newer ones that are damaged with what is wrong with each)."""
    damaged: list[tuple[Checkpoint, str]] = []
    for checkpoint in _all(folder):
        problem = checkpoint.damage()
        if not problem:
            return checkpoint, damaged
        damaged.append((checkpoint, problem))
    return None, damaged


def listed(files: Sequence[Path]) -> Entries:
    """The files, flushed to the disk, as a manifest lists them."""
    with ThreadPoolExecutor(2) as pool:  # hashing is the processor's work, flushing the disk's
        hashes = pool.map(sha256, files)
        _flush(files)
        return {f.name: {"bytes": f.stat().st_size, "sha256": h} for f, h in zip(files, hashes, strict=True)}


def flush(folder: Path) -> None:
    """A folder's files to the disk."""
    _flush(folder.iterdir())
    sync(folder)


def _flush(files: Iterable[Path]) -> None:
    """As readable as their folder is: safetensors would keep them to their owner."""
    for file in files:
        file.chmod(file.parent.stat().st_mode & 0o666)
        sync(file)


def remove(path: Path) -> None:
    """Delete a folder: renamed first, then deleted piece by piece, so that half of it never passes for the whole."""
    if path.exists():
        removed = path.with_name(path.name.removesuffix(".partial") + ".removed")
        shutil.rmtree(removed, ignore_errors=True)
        os.rename(path, removed)
        shutil.rmtree(removed, ignore_errors=True)


def clean(folder: Path) -> None:
    """Delete what a kill left behind half written or half deleted: files, checkpoints, a saved model."""
    places = (folder, folder / "checkpoints", folder / "rollouts")
    for path in (p for place in places if place.is_dir() for p in place.iterdir()):
        if path.suffix in (".partial", ".removed"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _all(folder: Path) -> list[Checkpoint]:
    """Newest first, by number: step-100000 comes after step-99999."""
    there = (folder / "checkpoints").glob("step-*")
    named = ((p, _NAME.fullmatch(p.name)) for p in there)
    return sorted((Checkpoint(p, int(m[1])) for p, m in named if m), key=lambda c: c.step, reverse=True)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, everything else), for a checkpoint."""
    state = optimizer.state_dict()
    entries = {f"{i}.{key}": value for i, entry in state["state"].items() for key, value in entry.items()}
    tensors = {name: value for name, value in entries.items() if value is not None}
    groups = [{k: v.item() if isinstance(v, torch.Tensor) else v for k, v in g.items()} for g in state["param_groups"]]
    numbers: dict[str, Any] = {"param_groups": groups}
    absent = sorted(entries.keys() - tensors.keys())  # optimi's: what a weight in float32 has nothing to carry along
    return tensors, numbers | ({"absent": absent} if absent else {})


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]
) -> None:
    """As `optimizer_state` gave it."""
    state: dict[int, dict[str, torch.Tensor | None]] = {}
    for name, tensor in [*tensors.items(), *((name, None) for name in numbers.get("absent", []))]:
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": numbers["param_groups"]})
    for group in optimizer.param_groups:
        if "step" in group:  # optimi counts a group's steps, in a tensor
            group["step"] = torch.tensor(group["step"], dtype=torch.int32)


class Pace:
    """When a checkpoint is due: every so many steps, or once `minutes` have passed; but what is saved by time may take
    SHARE of the time at most, measured by the last one that was saved."""

    def __init__(self, every: int, minutes: float) -> None:
        self.every, self.minutes = every, minutes
        self._last, self._took = time.monotonic(), 0.0

    @property
    def active(self) -> bool:
        return self.every > 0 or self.minutes > 0

    def due(self, done: int) -> bool:
        """After `done` steps."""
        if self.every and done % self.every == 0:
            return True
        passed = time.monotonic() - self._last
        return self.minutes > 0 and passed >= max(60 * self.minutes, self._took / SHARE)

    def saved(self, seconds: float) -> None:
        self._last, self._took = time.monotonic(), seconds

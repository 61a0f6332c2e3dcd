"""Frozen means frozen: what reward training recorded of a model's files, and whether they are still the same."""

from __future__ import annotations

import dataclasses
import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossmith.errors import RunError, ScorerError
from lossmith.files import at_home, sha256
from lossmith.rollouts import Score

__all__ = ["MANIFEST", "Seal", "checksums", "scale_of"]

MANIFEST = "reward_model.json"


@dataclass(frozen=True)
class Seal:
    """The manifest of a trained reward model, and how its files looked when they were checked in full."""

    folder: Path
    manifest: dict[str, Any]
    looks: dict[str, tuple[int, int]]  # file -> (bytes, time of change)

    @classmethod
    def of(cls, path: str | Path) -> Seal | None:
        """The seal of a folder, every file checked against its sha256; None where the folder has no manifest.

        ScorerError names the file that is missing or another than was trained.
        """
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            return None
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            files = dict(manifest["files"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ScorerError(f"reward model {str(path)!r}: its {MANIFEST} is damaged: {error}.") from None
        if "normalise" in manifest:
            raise ScorerError(
                f'reward model {str(path)!r}: its {MANIFEST} was written by an earlier version. Write "normalize" for '
                f'"normalise" in it.'
            )
        seal = cls(folder, manifest, {})
        for name in files:
            seal._check_file(name)
        return seal

    def check(self, *, full: bool = False) -> None:
        """ScorerError if a file was changed since: by size and time, then by content; `full` reads every file."""
        for name in self.manifest["files"]:
            if full or self.looks.get(name) != _look(self.folder / name):
                self._check_file(name)

    def rescaled(self, score: Score) -> Score:
        """The score in units of its spread over the training texts, around their mean, where the manifest says so."""
        scale = self.manifest.get("scale")
        if not self.manifest.get("normalize") or score.value is None or not scale:
            return score
        return dataclasses.replace(score, value=(score.value - scale["mean"]) / scale["std"])

    def _check_file(self, name: str) -> None:
        path = self.folder / name
        look = _look(path)
        if look is None or sha256(path) != self.manifest["files"][name]:
            what = "is missing" if look is None else "is not the file that was trained"
            raise ScorerError(
                f"reward model {str(self.folder)!r} is frozen, but its {name} {what}. Scores before and after would "
                f"not be comparable. Put the file back, or train the model again."
            )
        self.looks[name] = look


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of every file that decides a score, by its name."""
    kinds = {".safetensors", ".json", ".jinja", ".model", ".txt"}
    return {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.suffix in kinds and p.name != MANIFEST}


def scale_of(spec: Any) -> tuple[float, float] | None:
    """Mean and standard deviation of what a reward model says of the texts it was trained on, in the units of its
    scores; None where the scorer is none, or does not tell."""
    if not isinstance(spec, str | Path) or "://" in str(spec):
        return None
    try:
        manifest = json.loads((at_home(spec) / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("normalize") or manifest.get("ensemble"):  # members of an ensemble always are
            return 0.0, 1.0
        mean, std = float(manifest["scale"]["mean"]), float(manifest["scale"]["std"])
        return (mean, std) if math.isfinite(mean) and 0 < std < math.inf else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RunError):
        return None


def _look(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_size, status.st_mtime_ns

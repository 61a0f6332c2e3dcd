"""A run's folder: everything that was decided, measured and learned. Nothing in it is ever overwritten by another run.

recipe.toml      complete, defaults included        rollouts/     every completion, a parquet file a step
metrics.jsonl    a line a step                      checkpoints/  to resume from, complete or absent
summary.json     held-out before and after          policy/       loads with AutoModelForCausalLM.from_pretrained
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet
import tomli_w

from lossmith.errors import RunError
from lossmith.rollouts import Rollout
from lossmith.training.evaluate import Evaluation, comparison

__all__ = ["RunFolder", "check_disk"]


class NamedSettings(Protocol):
    """What a run's folder asks of a recipe."""

    @property
    def runs(self) -> str: ...

    @property
    def name(self) -> str | None: ...

    def as_toml(self) -> dict[str, Any]: ...


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, recipe: NamedSettings, loss_name: str) -> RunFolder:
        """A new folder under recipe.runs. RunError if a folder of the given name exists, or it cannot be written."""
        parent = Path(recipe.runs)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path = _new_folder(parent, recipe.name, loss_name)
        except OSError as error:
            raise RunError(
                f"cannot make a run folder in {str(parent)!r}: {error}. Choose another with runs=..."
            ) from None
        folder = cls(path)
        folder.write_text("recipe.toml", tomli_w.dumps(recipe.as_toml()))
        return folder

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        with tempfile.NamedTemporaryFile("w", dir=self.path, delete=False, encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path / name)

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Append one step to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def keep_metrics_before(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will do again."""
        if (self.path / "metrics.jsonl").exists():
            kept = [record for record in self.metrics() if record["step"] < step]
            self.write_text("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, a step each."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def add_rollouts(self, name: str, rollouts: Sequence[Rollout]) -> None:
        """Write rollouts/NAME.parquet, a row a completion."""
        (self.path / "rollouts").mkdir(exist_ok=True)
        target = self.path / "rollouts" / f"{name}.parquet"
        partial = target.with_suffix(".partial")
        pyarrow.parquet.write_table(rollout_table(rollouts), partial)
        os.replace(partial, target)

    def write_summary(self, before: Evaluation, after: Evaluation, more: dict[str, Any]) -> dict[str, Any]:
        """summary.json: held-out performance before and after, the paired difference, and what else is known."""
        summary = {"held_out": comparison(before, after), **more}
        self.write_text("summary.json", json.dumps(summary, indent=2) + "\n")
        return summary


def rollout_table(rollouts: Sequence[Rollout]) -> pyarrow.Table:
    """Rollouts as a table: text for people, token ids and behaviour log-probabilities for replay."""
    measure = [r.behavior_logp.measure for r in rollouts]
    return pyarrow.table(
        {
            "prompt_id": [r.prompt.id for r in rollouts],
            "prompt": [json.dumps(list(r.prompt.messages), ensure_ascii=False) for r in rollouts],
            "sample": [r.sample for r in rollouts],
            "completion": [r.completion for r in rollouts],
            "prompt_tokens": [list(r.prompt_ids) for r in rollouts],
            "tokens": [list(r.completion_ids) for r in rollouts],
            "behavior_logp": pyarrow.array(
                [r.behavior_logp.values.float().tolist() for r in rollouts], pyarrow.list_(pyarrow.float32())
            ),
            "score": pyarrow.array([r.score.value if r.score else None for r in rollouts], pyarrow.float64()),
            "score_error": pyarrow.array([r.score.error if r.score else None for r in rollouts], pyarrow.string()),
            "score_parts": [json.dumps(dict(r.score.parts) if r.score else {}) for r in rollouts],
            "score_logged": [json.dumps(r.score.logged if r.score else {}, default=str) for r in rollouts],
            "advantage": pyarrow.array([r.advantage for r in rollouts], pyarrow.float64()),
            "finish_reason": [r.finish_reason for r in rollouts],
            "truncated": [r.truncated for r in rollouts],
            "policy_version": [m.policy_version for m in measure],
            "temperature": [m.temperature for m in measure],
            "top_p": [m.top_p for m in measure],
            "top_k": [m.top_k for m in measure],
        }
    )


def _new_folder(parent: Path, name: str | None, loss_name: str) -> Path:
    if name is not None:
        if not re.fullmatch(r"[\w.\-]+", name):
            raise RunError(f"name = {name!r}: a run's name has letters, digits, '.', '-' and '_' only.")
        path = parent / name
        try:
            path.mkdir()
        except FileExistsError:
            raise RunError(
                f"the run folder {str(path)!r} exists, and a run never overwrites another. Choose another name, "
                f"or go on with it: lossmith train --resume {path}"
            ) from None
        return path
    stem = f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}-{loss_name}"
    for suffix in ["", *(f"-{k}" for k in range(2, 1000))]:
        try:
            (parent / (stem + suffix)).mkdir()
            return parent / (stem + suffix)
        except FileExistsError:
            continue
    raise RunError(f"cannot find a free folder name for {stem!r} in {str(parent)!r}.")


def check_disk(folder: str | Path, needed: int) -> None:
    """RunError if the disk under `folder` has fewer than `needed` bytes free."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RunError(
            f"the run may write {needed / 1e9:.1f} GB to {str(folder)!r}, but only {free / 1e9:.1f} GB are free there. "
            "Free some, choose another disk with runs=..., or write fewer checkpoints with checkpoint_every=0."
        )

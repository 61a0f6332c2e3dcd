"""A run's folder: everything that was decided, measured and learned. Nothing in it is ever overwritten by another run.

recipe.toml      complete, defaults included        rollouts/     every completion, a parquet file a step
inputs.json      fingerprints of what decided it    checkpoints/  to go on from: the last two, complete or absent
metrics.jsonl    a line a step                      policy/       loads with AutoModelForCausalLM.from_pretrained
policy-best/     the one with the best held-out score, where the recipe wishes: keep_best
summary.json     held-out before and after          findings.jsonl  what the guards said, a line each
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import re
import shlex
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow.parquet
import tomli_w

from lossmith.detectors import Finding
from lossmith.durable.checkpoint import clean, flush, remove
from lossmith.durable.folder import lock, unlock
from lossmith.durable.inputs import Inputs
from lossmith.errors import RunError
from lossmith.files import (
    append_line,
    explain_write_errors,
    read_text,
    replace_atomically,
    sha256,
    sync,
    write_atomically,
)
from lossmith.losses import Batch, Credit
from lossmith.policy import Policy
from lossmith.prompts import Prompt
from lossmith.rollouts import Rollout, read_rollouts, rollout_table
from lossmith.training.recipe import Recipe

__all__ = ["RunFolder", "check_disk", "disk_needed", "name_of", "read_metrics"]


FINDINGS = "findings.jsonl"
BEST, KEPT = "policy-best", "kept.json"  # a policy, and in its folder why it is kept


class NamedSettings(Protocol):
    """What a run's folder asks of a recipe."""

    resumed_by: ClassVar[str]
    extended_by: ClassVar[str]

    @property
    def runs(self) -> str: ...

    @property
    def name(self) -> str | None: ...

    def written(self) -> dict[str, Any]: ...


class RunFolder:
    """The folder of one run, which this process alone works in until it is closed.

    digests: sha256 of each file in rollouts/ that this run, or the part of it that is gone on with, has written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digests: dict[str, str] = {}

    @classmethod
    def create(cls, recipe: NamedSettings, loss_name: str, inputs: Inputs | None = None) -> RunFolder:
        """A new folder under recipe.runs. RunError if a run of the given name exists, or it cannot be written."""
        parent = Path(recipe.runs)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path = _new_folder(parent, recipe, loss_name)
        except OSError as error:
            reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or error
            raise RunError(
                f"cannot make a run folder in {str(parent)!r}: {reason}. Choose another with runs=..."
            ) from None
        folder = cls(path)
        try:
            if inputs is not None:
                inputs.write(path)
            folder.write_recipe(recipe)  # last: a folder with a recipe is a run that can be gone on with
        except BaseException:
            folder.close()
            shutil.rmtree(path, ignore_errors=True)  # nothing else is in it
            raise
        return folder

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The folder of a run that stopped. RunError: it is none, or another process is in it."""
        if not path.is_dir():
            raise RunError(f"there is no run folder {str(path)!r}.")
        lock(path)
        if not (path / "recipe.toml").exists():
            unlock(path)
            if _nothing_in(path):
                raise RunError(
                    f"the run {str(path)!r} was stopped before it began: there is nothing in it to go on with. Start "
                    "it anew, under the same name if you like."
                )
            raise RunError(f"{str(path)!r} is not a run folder: it holds no recipe.toml.")
        return cls(path)

    def close(self) -> None:
        """Let other processes work in it."""
        unlock(self.path)

    def clean(self) -> None:
        """Delete what a kill left half written."""
        clean(self.path)

    def write_recipe(self, recipe: NamedSettings) -> None:
        self.write_text("recipe.toml", tomli_w.dumps(recipe.written()))

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all. RunError: it cannot be written."""
        write_atomically(self.path / name, text)

    # -- metrics ------------------------------------------------------------------------------------------------------

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Append one step to metrics.jsonl."""
        append_line(self.path / "metrics.jsonl", json.dumps(record))

    def metrics_text(self) -> str:
        path = self.path / "metrics.jsonl"
        return path.read_bytes().decode("utf-8", "replace") if path.exists() else ""

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, a step each."""
        path = self.path / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def restore_metrics(self, text: str) -> bool:
        """Make metrics.jsonl what it was when `text` was its content; lines of later steps go, for these are redone.

        False: what it held of the earlier steps was not that.
        """
        found = self.metrics_text()
        if found != text and (text or found):
            self.write_text("metrics.jsonl", text)
        return found.startswith(text)

    # -- findings -----------------------------------------------------------------------------------------------------

    def add_findings(self, step: int, findings: Iterable[Finding]) -> None:
        """Append what the guards said after this step to findings.jsonl."""
        for finding in findings:
            line = json.dumps({"after_step": step, **finding.as_dict()}, ensure_ascii=False)
            append_line(self.path / FINDINGS, line)

    def findings(self) -> list[dict[str, Any]]:
        """The lines of findings.jsonl; those that a power cut left torn are left out."""
        place, found = self.path / FINDINGS, []
        for line in place.read_bytes().splitlines() if place.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                one = json.loads(line)
                found.append({**one, "after_step": one["after_step"]})
        return found

    def restore_findings(self, steps: Collection[int]) -> list[dict[str, Any]]:
        """Make findings.jsonl what it was after these steps; returns its lines."""
        kept = [line for line in self.findings() if line["after_step"] in steps]
        if (self.path / FINDINGS).exists():
            self.write_text(FINDINGS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        return kept

    # -- rollouts -----------------------------------------------------------------------------------------------------

    def add_rollouts(
        self, name: str, rollouts: Sequence[Rollout], batch: Batch | None = None, credit: Credit | None = None
    ) -> None:
        """Write rollouts/NAME.parquet, a row a completion; of a step, with what its loss saw and gave."""
        place = self.path / "rollouts" / f"{name}.parquet"
        with explain_write_errors(place):
            place.parent.mkdir(exist_ok=True)
        with replace_atomically(place) as partial:
            pyarrow.parquet.write_table(rollout_table(rollouts, batch, credit), partial)
            digest = sha256(partial)
        self.digests[name] = digest

    def read_rollouts(self, name: str, prompts: Iterable[Prompt]) -> list[Rollout] | None:
        """What was written as NAME, of these prompts; None unless it is there as it was written."""
        if not self._whole(name):
            return None
        known = {p.id: p for p in prompts}
        rollouts = read_rollouts(self.path / "rollouts" / f"{name}.parquet", known)
        return rollouts if all(r.prompt is known.get(r.prompt.id) for r in rollouts) else None

    def damaged_rollouts(self) -> list[str]:
        """Names of files in rollouts/ that are not there as they were written."""
        return [name for name in self.digests if not self._whole(name)]

    def _whole(self, name: str) -> bool:
        place = self.path / "rollouts" / f"{name}.parquet"
        return name in self.digests and place.is_file() and sha256(place) == self.digests[name]

    # -- the end ------------------------------------------------------------------------------------------------------

    def save_policy(self, policy: Policy, name: str = "policy", told: Mapping[str, Any] | None = None) -> None:
        """policy/, written whole: the one before it, if there is one, stays until then. told: why it is kept."""
        target = self.path / name
        partial = self.path / f"{name}.partial"
        remove(partial)
        try:
            with explain_write_errors(target):
                policy.save(partial)
                if told is not None:
                    (partial / KEPT).write_text(json.dumps(told) + "\n")
                flush(partial)
                remove(target)
                os.rename(partial, target)
                sync(self.path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def best(self, until: int | None = None) -> dict[str, Any] | None:
        """What is known of policy-best/; None where there is none.

        until: the steps of the run that are gone on with. A policy of later ones goes, for these are redone.
        """
        place = self.path / BEST
        try:
            kept = json.loads((place / KEPT).read_bytes())
            whole = isinstance(kept["mean"], int | float) and isinstance(kept["after_steps"], int)
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if whole and (until is None or kept["after_steps"] <= until):
            return dict(kept)
        if until is not None:
            remove(place)
        return None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json. The last file of a run: where it stands, everything else does too."""
        self.write_text("summary.json", json.dumps(summary, indent=2) + "\n")

    def finished(self, steps: int | None) -> dict[str, Any] | None:
        """summary.json of a run of so many steps (None: of any) that has come to its end; else None."""
        try:
            summary = json.loads((self.path / "summary.json").read_bytes())
        except (OSError, ValueError):
            return None
        there = isinstance(summary, dict) and "steps" in summary and (self.path / "policy").is_dir()
        there = there and steps in (None, summary["steps"])
        return summary if there else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, a step each; a last line that a power cut or a running process left torn is left
    out. RunError: it is not there, or another line is damaged."""
    found: list[dict[str, Any]] = []
    lines = read_text(path, RunError, "metrics file").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            found.append({**record, "step": record["step"]})
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                raise RunError(
                    f"{path}:{number}: the line is damaged. A run that is gone on with writes it again."
                ) from None
    return found


def _new_folder(parent: Path, recipe: NamedSettings, loss_name: str) -> Path:
    """Made, and held by this process."""
    if recipe.name is not None:
        return _named_folder(parent, recipe.name, recipe)
    stem = name_of(loss_name)
    for suffix in ["", *(f"-{k}" for k in range(2, 1000))]:
        path = parent / (stem + suffix)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        lock(path)
        return path
    raise RunError(f"cannot find a free folder name for {stem!r} in {str(parent)!r}.")


def name_of(loss_name: str) -> str:
    """A run's name where none is given: the time, and what it learns with."""
    return f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}-{loss_name}"


def _named_folder(parent: Path, name: str, recipe: NamedSettings) -> Path:
    if not re.fullmatch(r"[\w.\-]+", name):
        raise RunError(f"name = {name!r}: a run's name has letters, digits, '.', '-' and '_' only.")
    path = parent / name
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir() or not _nothing_in(path):
            go_on = ""
            over = (path / "summary.json").exists()
            if (path / "recipe.toml").exists() and (recipe.extended_by or not over):
                go_on = f", or go on with it: {recipe.resumed_by} {shlex.quote(str(path))}{recipe.extended_by * over}"
            raise RunError(
                f"the run folder {str(path)!r} exists, and a run never overwrites another. Choose another name{go_on}"
            ) from None
    lock(path)
    return path


def _nothing_in(path: Path) -> bool:
    """Whether a run that was stopped before it began left this folder: its recipe is not there yet."""
    return all(p.name == "inputs.json" or p.suffix == ".partial" for p in path.iterdir())


def disk_needed(policy: Policy, recipe: Recipe, folder: RunFolder | None = None) -> int:
    """Bytes a run may write: the policy, two checkpoints with their optimizer state, and the next one beside them.

    folder: of a resumed run, whose checkpoints are there already.
    """
    weights = sum(p.numel() * 4 for p in policy.parameters())  # beside an adapter, nothing else is written
    there = 0 if folder is None else sum(1 for _ in (folder.path / "checkpoints").glob("step-*"))
    checkpoints = max(3 - there, 1) * 3 * weights if recipe.checkpoint_every or recipe.checkpoint_minutes else 0
    policies = 3 if recipe.keep_best else 1  # the last, the best, and the next best beside it
    return policies * weights + checkpoints + 50_000_000


def check_disk(folder: str | Path, needed: int) -> None:
    """RunError if the disk under `folder` has fewer than `needed` bytes free."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RunError(
            f"the run may write {needed / 1e9:.1f} GB to {str(folder)!r}, but only {free / 1e9:.1f} GB are free there. "
            "Free some, choose another disk with runs=..., or do without checkpoints, which a run that stops would go "
            "on from: checkpoint_minutes=0 and checkpoint_every=0."
        )

"""Training that takes long: what there is of it stands in FOLDER.partial, and the same command goes on with it.

inputs.json   what decides the model        scores-K.json   what member K, which is finished, says of the held-out texts
training-K/   checkpoints of member K       model/          what becomes FOLDER
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lossmith.durable.checkpoint import Pace, clean, flush, newest, remove, save
from lossmith.durable.folder import lock, unlock
from lossmith.durable.inputs import Inputs
from lossmith.durable.stopping import Stopping
from lossmith.errors import LossmithError, RunError
from lossmith.files import explain_write_errors, sync, write_atomically
from lossmith.reward_model.fit import Fit
from lossmith.reward_model.recipe import RewardRecipe

__all__ = ["UnderWay"]


class UnderWay:
    """FOLDER.partial, which this process alone works in. RunError: another one does, or it holds another training."""

    def __init__(self, target: Path, now: Inputs, minutes: float, stop: Stopping) -> None:
        self.target, self.stop, self.minutes = target, stop, minutes
        self.path = target.with_name(target.name + ".partial")
        self.model = self.path / "model"
        self.notes: list[str] = []
        self._fit: Fit | None = None
        self._member, self._saved, self._saving = 0, 0, False
        with explain_write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        lock(self.path)
        try:
            self._open(now)
        except BaseException:
            unlock(self.path)
            raise

    def _open(self, now: Inputs) -> None:
        then = Inputs.read(self.path)
        if then is None and any(not p.name.startswith(".") for p in self.path.iterdir()):
            raise RunError(
                f"{str(self.path)!r} is not what `lossmith reward train` leaves when it stops. Move it away."
            )
        if then is not None and self.kept:
            settings = then.changed_settings(now.settings, RewardRecipe.defaults())
            changed = [f"{key}: {change}" for key, change in settings.items()]
            changed += then.changed(now)
            if changed:
                raise RunError(
                    f"{str(self.path)!r} holds what was trained already of {str(self.target)!r}, by another command or "
                    f"other files: {'; '.join(changed)}. Put that back to go on with it, or delete it to begin anew."
                )
            moved = then.moved(now)
            self.notes += [f"not where it began ({'; '.join(moved)}): its last bits may differ."] if moved else []
            for place in (self.path, self.model, *self.path.glob("training-*")):
                clean(place)
            return
        for left in self.path.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        now.write(self.path)

    @property
    def kept(self) -> bool:
        """Whether there is anything to go on with."""
        return any(self.path.glob("scores-*.json")) or any(
            not p.suffix for p in self.path.glob("training-*/checkpoints/step-*")
        )

    # -- a member -----------------------------------------------------------------------------------------------------

    def train(self, member: int, fit: Fit) -> Iterator[str]:
        """Train to the end, from the newest checkpoint that is whole; yields a line for people or "" after each step.

        RunError: every checkpoint is damaged.
        """
        place = self.path / f"training-{member}"
        found, damaged = newest(place)
        if damaged:
            wrong = "; ".join(f"{c.path.name}: {why}" for c, why in damaged)
            if found is None:
                raise RunError(f"every checkpoint in {str(place)!r} is damaged ({wrong}). Delete it to begin anew.")
            yield f"damaged checkpoint ({wrong}): going on from the one before"
            for one, _ in damaged:
                remove(one.path)
        if found is not None:
            fit.load(found)
            yield f"going on after step {fit.done} of {fit.total}"
        pace = Pace(0, self.minutes)
        self._fit, self._member, self._saved = fit, member, fit.done
        self.stop.busy = lambda: self._saving or not fit.settled
        for line in fit.steps():
            yield line
            if pace.due(fit.done) and fit.done < fit.total:
                start = time.perf_counter()
                self._save()
                pace.saved(time.perf_counter() - start)
            self.stop.check()

    def _save(self) -> None:
        """A checkpoint of the member under way, unless it is there already."""
        fit = self._fit
        if fit is None or not fit.settled or fit.done <= self._saved:
            return
        self._saving = True
        try:
            tensors, state = fit.state()
            save(self.path / f"training-{self._member}", fit.done, tensors, {"state.json": json.dumps(state)})
        finally:
            self._saving = False
        self._saved = fit.done

    def finish_member(self, member: int, folder: Path, scores: list[Tensor], write: Callable[[Path], None]) -> None:
        """`write` the model into `folder`, whole or not at all; `scores` are those of the held-out texts."""
        partial = folder.with_name(folder.name + ".partial")
        with explain_write_errors(folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial)
            flush(partial)
            write_atomically(self.path / f"scores-{member}.json", json.dumps([s.tolist() for s in scores]))
            os.rename(partial, folder)
            sync(folder.parent)
            self._fit = None
            remove(self.path / f"training-{member}")

    def scores(self, member: int, folder: Path) -> list[Tensor] | None:
        """Those of a member that is finished; None of one that is not."""
        if not folder.is_dir():
            return None
        found = json.loads((self.path / f"scores-{member}.json").read_bytes())
        return [torch.tensor(row, dtype=torch.float32) for row in found]

    # -- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """FOLDER, whole; and no FOLDER.partial any more."""
        with explain_write_errors(self.target):
            for file in self.model.iterdir():
                sync(file)
            os.replace(self.model, self.target)
            sync(self.target.parent)
        self.discard()

    def discard(self) -> None:
        """There is nothing in it to go on with."""
        unlock(self.path)
        remove(self.path)

    def stopped(self, error: BaseException) -> None:
        """Keep what can be kept; a note of the error says how to go on."""
        failed = ""
        if not self.stop.at_once:
            try:
                self._save()
            except (LossmithError, KeyboardInterrupt) as found:
                failed = f"{found or 'It was not saved: you left at once.'} "
        if not self.kept:
            self.discard()
            return
        unlock(self.path)
        where = f"saved after step {self._saved} of {self._fit.total}" if self._fit is not None else "saved"
        of = f" of member {self._member + 1}" if self._member and self._fit is not None else ""
        error.add_note(f"{failed}The training is {where}{of}, in {self.path}. The same command again goes on with it.")

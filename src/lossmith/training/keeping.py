"""What keeps a run from being lost, whatever it learns from."""

from __future__ import annotations

import time
from typing import Any

from lossmith.durable.checkpoint import Pace
from lossmith.training.checkpoint import load_checkpoint, save_checkpoint
from lossmith.training.going_on import GoingOn
from lossmith.training.learner import Learner
from lossmith.training.run import RunFolder

__all__ = ["Keeping"]


class Keeping:
    """The part of a run that is saved and gone on with. The run has the fields that are only named here."""

    recipe: Any  # of a kind that has checkpoint_every and checkpoint_minutes
    learner: Learner
    folder: RunFolder
    going_on: GoingOn
    summary: dict[str, Any]  # what summary.json holds, once the run is finished
    first_step = 0
    done = 0  # finished steps in what is in memory
    saved = 0  # finished steps in the newest checkpoint
    saving = False

    def __post_init__(self) -> None:
        self.pace = Pace(self.recipe.checkpoint_every, self.recipe.checkpoint_minutes)

    @property
    def steps(self) -> int:
        """How many there are to be."""
        raise NotImplementedError

    @property
    def busy(self) -> bool:
        """Whether nothing may be interrupted now: the weights are between two steps, or are being written.

        Ranks that hold them in parts could not be asked for these while they are at work either.
        """
        learner = self.learner
        return self.saving or not learner.settled or (learner.shards is not None and learner.ranks.at_work)

    def recorded(self, done: int) -> None:
        """So many steps are done and written down; a checkpoint, when it is due."""
        self.done = done
        self.learner.settled = True  # from here on this step is never done again
        if self.pace.due(done):
            self.save()

    def save(self) -> None:
        """A checkpoint of what is in memory, where the recipe wants any, unless it is there already."""
        if not self.pace.active or self.done <= self.saved:
            return
        self.saving, start = True, time.perf_counter()
        try:
            more = {"rollouts": self.folder.digests}
            save_checkpoint(self.folder.path, self.learner, self.done, self.folder.metrics_text(), more)
        finally:
            self.saving = False
        self.saved = self.done
        self.pace.saved(time.perf_counter() - start)

    def load(self) -> None:
        """The state that is gone on with, if there is any, into the learner; and the folder as it was then."""
        checkpoint, metrics = self.going_on.checkpoint, ""
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, self.learner, self.going_on.changed)
            self.first_step = self.done = self.saved = state["step"]
            self.folder.digests = state["rollouts"] | self.folder.digests
            self.learner.share_weights()
            metrics = checkpoint.text("metrics.jsonl")
        self.going_on.set_right(self.folder, metrics)

    def close(self) -> None:
        """Let others work in the folder."""
        self.folder.close()

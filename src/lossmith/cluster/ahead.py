"""Rounds that are sampled and scored before the learner has come to them, and kept in the run folder until it has.

A round is begun with the weights of a moment that is fixed: when the learner begins the round max_staleness before it.
So no rollout is ever older than that, and what is sampled does not depend on who was slow.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pyarrow.parquet

from lossmith.errors import RunError
from lossmith.files import replace_atomically
from lossmith.policy import Policy
from lossmith.prompts import Prompt, PromptSet
from lossmith.rollouts import Rollout, read_rollouts, rollout_table
from lossmith.samplers import Sampler
from lossmith.training.clock import Clock
from lossmith.training.sharing import Sampling

__all__ = ["Ahead", "Buffer"]

Round = tuple[list[Rollout], dict[str, float]]


class Keeps(Sampler, Protocol):
    """A sampler that can keep the weights of a moment."""

    measured: dict[str, float]  # what the last push returned, with what was measured of it since

    def as_of_now(self) -> Keeps:
        """One that goes on writing with the weights of the last push, and measures for itself."""


class Ahead:
    """The task "sample" of a run whose samplers may be `max_staleness` rounds ahead."""

    def __init__(self, own: Sampling, sampler: Keeps, policy: Policy, prompts: PromptSet, buffer: Buffer) -> None:
        """own: how a round is sampled and scored. policy: the one that learns."""
        self.own, self.sampler, self.policy, self.prompts, self.buffer = own, sampler, policy, prompts, buffer
        self._begun: dict[int, tuple[Keeps, Future[Round]]] = {}
        self._pool = ThreadPoolExecutor(own.recipe.max_staleness + 1)

    def __call__(self, prompts: Sequence[Prompt], n: int, step: int) -> Round:
        if step < 0:  # held-out prompts, with the policy as it is
            return self.own(prompts, n, step)
        recipe = self.own.recipe
        for later in range(step, min(step + recipe.max_staleness + 1, recipe.steps)):
            if later not in self._begun:
                self._begun[later] = self._begin(later, quiet=later > step)
        self.buffer.forget()
        clock = Clock()
        with clock("sample"):
            sampler, begun = self._begun.pop(step)
            rollouts, seconds = begun.result()
            self.sampler.measured |= sampler.measured  # of the weights that wrote the round, which may be older
            if not self._in_bounds(rollouts):  # kept by a process that had come further, or from before a change
                rollouts, _ = self.own(prompts, n, step)
                self.buffer.write(step, rollouts)
        return rollouts, clock.read() if recipe.max_staleness else seconds

    def _in_bounds(self, rollouts: Sequence[Rollout]) -> bool:
        """Whether all were written by the policy as it is, or as it was at most max_staleness rounds ago."""
        recipe, now = self.own.recipe, self.policy.version
        updates = recipe.epochs * min(recipe.updates_per_step, recipe.prompts_per_step)
        versions = {r.behavior_logp.distribution.policy_version for r in rollouts}
        return all(0 <= now - version <= recipe.max_staleness * updates for version in versions)

    def _begin(self, step: int, quiet: bool) -> tuple[Keeps, Future[Round]]:
        recipe = self.own.recipe
        prompts = self.prompts.batch(step, recipe.prompts_per_step, recipe.seed)
        sampler = self.sampler.as_of_now()
        own = dataclasses.replace(self.own, sampler=sampler)
        if quiet:
            own = dataclasses.replace(own, tell=lambda what, done, total: None)

        def draw() -> Round:
            kept = self.buffer.read(step, prompts, recipe.samples_per_prompt)
            if kept is not None:
                return kept, {}
            rollouts, seconds = own(prompts, recipe.samples_per_prompt, step)
            self.buffer.write(step, rollouts)
            return rollouts, seconds

        return sampler, self._pool.submit(draw)


class Buffer:
    """buffer/ of a run folder: rounds that were written and scored, each whole or absent, until a checkpoint
    holds what was learned of them."""

    def __init__(self, folder: Path, first_step: int, fresh: bool) -> None:
        """fresh: what an earlier process left there is of other settings, and goes; else what is before first_step."""
        self.folder = folder / "buffer"
        if fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._drop(first_step)

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:05d}.parquet"

    def write(self, step: int, rollouts: Sequence[Rollout]) -> None:
        if any(r.kept is not None for r in rollouts):
            return  # a file does not hold these: the round would be written again
        self.folder.mkdir(exist_ok=True)
        with replace_atomically(self._place(step)) as partial:
            pyarrow.parquet.write_table(rollout_table(rollouts), partial)

    def read(self, step: int, prompts: Sequence[Prompt], n: int) -> list[Rollout] | None:
        """What is kept of this round; None where nothing is, or not what was asked for."""
        if not self._place(step).exists():
            return None
        known = {p.id: p for p in prompts}
        try:
            rollouts = read_rollouts(self._place(step), known)
        except RunError:
            return None
        asked = [(p.id, k) for p in prompts for k in range(n)]
        return rollouts if [(r.prompt.id, r.sample) for r in rollouts] == asked else None

    def forget(self) -> None:
        """Rounds from before the oldest checkpoint that there is: nobody goes on from there."""
        kept = [int(p.name.removeprefix("step-")) for p in self.folder.parent.glob("checkpoints/step-?????")]
        self._drop(min(kept, default=0))

    def _drop(self, before: int) -> None:
        for path in self.folder.glob("step-*.parquet"):
            if int(path.stem.removeprefix("step-")) < before:
                path.unlink(missing_ok=True)

"""The learner's process: the run, opened or gone on with, as on any machine; completions come from the others."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lossmith.cluster.ahead import Ahead, Buffer
from lossmith.cluster.placement import import_ray
from lossmith.cluster.remote import RemoteSampler, RemoteScorer
from lossmith.cluster.workers import at_work_in
from lossmith.durable.stopping import Stopping
from lossmith.errors import LossmithError, RunError
from lossmith.prompts import Prompt, PromptSet
from lossmith.ranks import of_environment
from lossmith.running import GoOn, make_run
from lossmith.samplers import Sampler
from lossmith.scorers import Scorer
from lossmith.training import Learner, plan
from lossmith.training.going_on import GoingOn
from lossmith.training.prepare import work_for
from lossmith.training.recipe import Recipe
from lossmith.training.run import RunFolder
from lossmith.training.sharing import Sampling, Task

__all__ = ["LearnerProcess", "Others", "Outcome"]


@dataclass(frozen=True)
class Others:
    """The samplers and scorers of the run, as its learner sees them."""

    samplers: Sequence[Any]
    scorers: Sequence[Any]

    def scorer(self) -> Scorer:
        return RemoteScorer(self.scorers)

    def sampler(self, learner: Learner, probe: Prompt, context: int) -> Sampler:
        return RemoteSampler(self.samplers, learner, probe, context)

    def sampling(self, own: Sampling, prompts: PromptSet, folder: RunFolder, going_on: GoingOn) -> Task:
        sampler = own.sampler
        assert isinstance(sampler, RemoteSampler)
        first = 0 if going_on.checkpoint is None else going_on.checkpoint.step
        return Ahead(
            own, sampler, sampler.learner.policy, prompts, Buffer(folder.path, first, fresh=bool(going_on.changed))
        )


@dataclass(frozen=True)
class Outcome:
    """How it ended. signal: what stopped it, saved; error: what went wrong. notes: of either, how to go on."""

    summary: dict[str, Any] | None = None
    signal: int = 0
    error: LossmithError | None = None
    notes: Sequence[str] = ()


class _Said:
    """A file to write to, read by another thread."""

    def __init__(self) -> None:
        self._lock, self._text = threading.Lock(), ""

    def write(self, text: str) -> int:
        with self._lock:
            self._text += text
        return len(text)

    def flush(self) -> None:
        pass

    def read(self) -> str:
        with self._lock:
            text, self._text = self._text, ""
        return text


class LearnerProcess:
    """Two calls at a time: one makes the run, and the other asks what it has said, or tells it to end."""

    def __init__(self) -> None:
        self._said, self._stop = _Said(), Stopping()

    def address(self) -> tuple[str, int]:
        """Where the other ranks find this one."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return import_ray().util.get_node_ip_address(), probe.getsockname()[1]

    def said(self) -> str:
        """What it has written since it was asked last."""
        return self._said.read()

    def stop(self, number: int) -> None:
        """End after the step that is under way, as a signal of this number would."""
        self._stop.signal_number = number

    def run(
        self, recipe: dict[str, Any], resume: GoOn | None, others: Others, here: str, width: int, ranks: dict[str, str]
    ) -> Outcome:
        """here: the folder that the command was given in. ranks: which one this is, as torchrun's variables say it."""
        at_work_in(here)
        os.environ.update(ranks)
        console = Console(file=self._said, width=width, color_system=None, force_terminal=False)  # type: ignore[arg-type]
        try:
            checked = plan(Recipe.make("the recipe", **recipe), None if resume is None else resume.held_out_ids)
            mine = of_environment()
            if mine.rank:
                work_for(checked, mine, elsewhere=True)
                return Outcome()
            run = make_run(checked, console, resume=resume, ranks=mine, elsewhere=others, stop=self._stop)
        except (KeyboardInterrupt, SystemExit) as end:
            return Outcome(signal=self._stop.signal_number or 2, notes=getattr(end, "__notes__", []))
        except LossmithError as error:
            return Outcome(error=error, notes=getattr(error, "__notes__", []))
        except Exception as error:
            notes = [*getattr(error, "__notes__", []), traceback.format_exc()]
            return Outcome(error=RunError(f"the learner failed: {type(error).__name__}: {error}"), notes=notes)
        shutil.rmtree(Path(run.folder.path) / "buffer", ignore_errors=True)
        return Outcome(run.summary)

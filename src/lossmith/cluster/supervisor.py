"""A run on a cluster, from the command's side: starts its processes, shows what the learner says, and starts a learner
that was lost again, from its last checkpoint. Samplers and scorers that are lost are Ray's to start again."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lossmith.cluster.asking import asked, lost
from lossmith.cluster.learner import LearnerProcess, Others, Outcome
from lossmith.cluster.placement import Placement, Rooms, connected, import_ray, rooms
from lossmith.cluster.workers import SamplerProcess, ScorerProcess
from lossmith.durable.checkpoint import newest
from lossmith.durable.stopping import Stopped, Stopping
from lossmith.errors import RecipeError, RunError
from lossmith.running import GoOn
from lossmith.training import Plan, Recipe
from lossmith.training.going_on import command_of
from lossmith.training.run import RunFolder, name_of

__all__ = ["ClusterRun", "supervise"]

LOST = 5  # learners in a row, none of which has come further than the one before
LOOK = 0.5  # seconds between two looks at what the learner has said


@dataclass(frozen=True)
class ClusterRun:
    """A run that came to its end: its folder, with the policy in policy/, and what its summary.json holds."""

    folder: RunFolder
    summary: dict[str, Any]


def supervise(plan: Plan, placement: Placement, console: Console, resume: GoOn | None = None) -> ClusterRun:
    """Make the run, or go on with one. RecipeError, RunError: it cannot be made on a cluster, or was lost for good."""
    recipe = _named(plan)
    folder = resume.folder if resume is not None else Path(recipe.runs) / str(recipe.name)
    written, here = recipe.written(), os.getcwd()
    with Stopping(busy=lambda: True) as stop, connected(placement), rooms(placement) as places:
        remote = import_ray().remote
        again = {"max_restarts": -1, "max_task_retries": 0}
        others = Others(
            [remote(SamplerProcess).options(**place, **again).remote(written, here) for place in places.samplers],
            [remote(ScorerProcess).options(**place, **again).remote(written, here) for place in places.scorers],
        )
        for _ in asked("a scorer", others.scorers[:1], [lambda process: process.about.remote()]):
            pass  # a scorer that does not load is heard of before the model is
        furthest, in_vain = -1, 0
        while (outcome := _learn(written, resume, others, places, console, stop)) is None:
            resume, furthest, in_vain = _after_loss(folder, resume, furthest, in_vain, console)
        if outcome.signal:
            stop.signal_number = None  # it has been done
    return _ended(outcome, folder)


def _named(plan: Plan) -> Recipe:
    """The recipe under a name of its own, so that a learner that starts again knows the folder of the one before."""
    recipe = plan.recipe
    live = recipe.in_memory()
    if live:
        raise RecipeError(
            f"{', '.join(live)} cannot be given to the processes of a cluster: they are Python objects. Write them "
            "where they are to be found."
        )
    if recipe.engine == "trl":
        raise RecipeError("engine = 'trl' places its own processes: leave it at 'lossmith' on a cluster.")
    if recipe.sampler_url is not None:
        raise RecipeError("sampler_url names one server; on a cluster each sampler starts its own: leave it out.")
    if recipe.name is None:
        recipe = recipe.model_copy(update={"name": name_of(recipe.policy_loss().name)})
    return recipe


def _learn(
    written: dict[str, Any],
    resume: GoOn | None,
    others: Others,
    places: Rooms,
    console: Console,
    stop: Stopping,
) -> Outcome | None:
    """How the learner ended; None where it was lost."""
    ray = import_ray()
    learners = [
        ray.remote(LearnerProcess).options(**place, max_concurrency=2, max_restarts=0).remote()
        for place in places.learners
    ]
    first = learners[0]
    try:
        address, port = ray.get(first.address.remote())
        common = {"WORLD_SIZE": str(len(learners)), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        ends = [
            one.run.remote(
                written, resume, others, os.getcwd(), console.width,
                common | {"RANK": str(rank), "LOCAL_RANK": "0"},  # Ray shows a process its own GPU alone
            )
            for rank, one in enumerate(learners)
        ]  # fmt: skip
        return _followed(first, ends, console, stop)
    except lost():
        return None
    except Stopped as end:
        folder = Path(written["runs"]) / written["name"] if resume is None else resume.folder
        end.add_note(f"It was left at once. Go on with: {command_of(Recipe, RunFolder(folder))} --cluster ray")
        raise
    finally:
        for one in learners:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(one)


def _followed(first: Any, ends: list[Any], console: Console, stop: Stopping) -> Outcome:
    """The outcome of rank 0, and meanwhile what it says. It is told of the first signal; a second ends the waiting."""
    ray, told = import_ray(), False
    while True:
        ray.wait(ends, num_returns=1, timeout=LOOK)
        done, _ = ray.wait(ends[:1], timeout=0)
        if text := ray.get(first.said.remote()):
            console.out(text, end="", highlight=False)
        if stop.signal_number is not None and not told:
            told = True
            first.stop.remote(stop.signal_number)
        if done:
            outcome: Outcome = ray.get(done[0])
            for other in ends[1:]:
                if outcome.error is not None and ray.wait([other], timeout=LOOK)[0]:
                    ray.get(other)  # RayActorError: it was lost, and that is why
            return outcome


def _after_loss(
    folder: Path, resume: GoOn | None, furthest: int, in_vain: int, console: Console
) -> tuple[GoOn | None, int, int]:
    """How the next learner goes on, how far the run is, and how many learners have come no further than that."""
    begun = (folder / "recipe.toml").exists()
    there = RunFolder(folder)
    done = len(there.metrics()) if begun else 0
    in_vain = 1 if done > furthest else in_vain + 1
    if in_vain == LOST:
        raise RunError(
            f"the learner was lost {LOST} times and came no further than {done} steps. Out of memory? Ray's logs of it "
            "say more (/tmp/ray/session_latest/logs)."
        )
    checkpoint, _ = newest(folder) if begun else (None, [])
    where = "from the beginning" if checkpoint is None else f"from the checkpoint after step {checkpoint.step}"
    console.print(f"the learner was lost; another goes on {where}", highlight=False)
    if not begun:
        return resume, max(done, furthest), in_vain
    if resume is None:
        resume = GoOn.of(folder)
    return resume, max(done, furthest), in_vain


def _ended(outcome: Outcome, folder: Path) -> ClusterRun:
    """The run; or what ended it, raised here as it was there."""
    if outcome.summary is not None:
        return ClusterRun(RunFolder(folder), outcome.summary)
    end: BaseException
    if outcome.error is not None:
        end = outcome.error
    else:
        end = KeyboardInterrupt() if outcome.signal == signal.SIGINT else SystemExit(128 + outcome.signal)
    end.__notes__ = list(outcome.notes)  # not added: an error may have come with them
    raise end

"""A run from its opening to its closing words, in the process that makes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lossmith.durable.inputs import Inputs
from lossmith.durable.stopping import Stopping
from lossmith.errors import LossmithError
from lossmith.ranks import Ranks
from lossmith.report.run.closing import closing
from lossmith.report.run.live import LiveView
from lossmith.report.run.opening import opening
from lossmith.report.run.tracking import Tracking
from lossmith.training import Plan, Run, Step, learn, open_run
from lossmith.training.going_on import command_of
from lossmith.training.keeping import Keeping
from lossmith.training.sharing import Elsewhere

__all__ = ["GoOn", "how_to_go_on", "kept", "make_run"]


@dataclass(frozen=True)
class GoOn:
    """Which run is gone on with, and what of it may be other than it was."""

    folder: Path
    held_out_ids: list[str] | None
    accept_changes: bool = False
    more_steps: bool = False

    @classmethod
    def of(cls, folder: Path, accept_changes: bool = False, more_steps: bool = False) -> GoOn:
        """With the held-out prompts that the run in this folder has."""
        known = Inputs.read(folder)
        held_out_ids = None if known is None else known.known.get("held_out")
        return cls(folder, held_out_ids, accept_changes, more_steps)


def make_run(
    plan: Plan,
    console: Console,
    *,
    resume: GoOn | None = None,
    ranks: Ranks | None = None,
    elsewhere: Elsewhere | None = None,
    stop: Stopping | None = None,
) -> Run:
    """Open the run, or go on with one, and make its steps; each is shown on the console.

    elsewhere: where completions are written and scored, if not here. stop: is asked after each step whether to end.
    """
    with stop or Stopping() as stop:
        run = open_run(
            plan, None if resume is None else resume.folder, ranks=ranks, elsewhere=elsewhere,
            accept_changes=resume is not None and resume.accept_changes,
            more_steps=resume is not None and resume.more_steps,
        )  # fmt: skip
        with kept(run, stop):
            _show_run(plan, run, console, stop)
    return run


def _show_run(plan: Plan, run: Run, console: Console, stop: Stopping) -> None:
    """The run from its opening to its closing words."""
    console.print(opening(plan, run), highlight=False, soft_wrap=True, markup=False)
    with LiveView(run, console) as view:
        run.start()
        for note in run.going_on.notes:
            console.print("note      " + note, highlight=False, soft_wrap=True, markup=False)
        with Tracking(run, console) as tracking:
            _show_steps(run, view, tracking, stop)
            view.end()
            run.finish()
            tracking.end(run.summary["held_out"])
    closing(run, run.summary, console)


def _show_steps(run: Run, view: LiveView, tracking: Tracking, stop: Stopping) -> None:
    view.begin()

    def shown(step: Step) -> None:
        view.show(step)
        tracking.step(step.record)
        stop.check()

    if run.recipe.engine == "trl":
        from lossmith.adapters.trl import engine

        engine.learn(run, shown)
    else:
        for step in learn(run):
            shown(step)


@contextlib.contextmanager
def kept(run: Keeping, stop: Stopping) -> Iterator[None]:
    """Whatever ends the block early, a signal or an error, the run is saved, and a note of it says how to go on."""
    stop.busy = lambda: run.busy
    try:
        yield
    except BaseException as error:
        error.add_note(_rescue(run, stop))
        raise
    finally:
        run.close()


def _rescue(run: Keeping, stop: Stopping) -> str:
    """Save what can be saved; what there is to go on with, in words."""
    failed = ""
    if run.learner.settled and not stop.at_once:
        try:
            run.save()
        except (LossmithError, KeyboardInterrupt) as error:
            failed = str(error) or "It was not saved: you left at once."
    if run.summary:
        return f"The run is finished: {run.folder.path}"
    where = f"saved after step {run.saved} of {run.steps}" if run.saved else "no step saved: it begins with the first"
    return " ".join(filter(None, [failed, f"The run is {where}. Go on with: {how_to_go_on(run)}"]))


def how_to_go_on(run: Keeping) -> str:
    """The command; where a file cannot hold all of the run, the call."""
    live = run.recipe.in_memory()
    if live:
        return f"{run.recipe.resumed_in_python}({str(run.folder.path)!r}, {', '.join(f'{key}=...' for key in live)})"
    return command_of(run.recipe, run.folder)

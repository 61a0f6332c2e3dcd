"""`lossmith prefer`: a policy straight from preferences, without a reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from lossmith.api import kept
from lossmith.cli.streams import RunConsole, print_json
from lossmith.cli.words import settings_of
from lossmith.durable.stopping import Stopping
from lossmith.errors import FinishedError, RecipeError
from lossmith.intervals import in_words
from lossmith.report.run.code import show_code
from lossmith.report.run.live import Busy, step_line
from lossmith.report.run.prompts import who_reads
from lossmith.training.offline.loop import (
    PreferenceRecipe,
    PreferenceRun,
    learn_preferences,
    open_preferences,
    plan_preferences,
    resume_preferences,
)
from lossmith.training.offline.preference_scores import verdict

__all__ = ["prefer"]

_FIGURES = (
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "accuracy", "{:.2f}"),
    ("margin", "margin", "{:+.3f}"),
    ("chosen_log_ratio", "chosen", "{:+.3f}"),
    ("rejected_log_ratio", "rejected", "{:+.3f}"),
    ("grad_norm", "grad", "{:.2f}"),
)


def prefer(
    preferences: str | None = None,
    /,
    *,
    settings: Annotated[PreferenceRecipe | None, Parameter(name="*")] = None,
    recipe: Path | None = None,
    resume: Path | None = None,
    accept_changes: Annotated[bool, Parameter(negative="")] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Train a policy on preferences: DPO, IPO, KTO and their kin, without a reward model.

    Parameters
    ----------
    preferences
        A preferences file (pairs, rankings, ratings or labels), or a database of judgements (.db).
    recipe
        A TOML file that sets any of the options below; options given here win over it.
    resume
        A run folder to go on with from its last checkpoint.
    accept_changes
        With --resume: go on although the recipe, the preferences, the loss or the model are not what they were.
    as_json
        Print the summary as JSON on standard output, everything else on standard error.
    """
    console = RunConsole(stderr=as_json)
    given = settings is not None and settings.model_fields_set
    if resume is not None and (preferences is not None or recipe is not None or given):
        raise RecipeError(
            "--resume goes on with the recipe of its run folder: of all other options, only --accept-changes goes with "
            "it."
        )
    if resume is None and accept_changes:
        raise RecipeError("--accept-changes goes with --resume: a new run has nothing that could have changed.")
    try:
        with Stopping() as stop:
            if resume is not None:
                run = resume_preferences(resume, accept_changes=accept_changes)
            else:
                made = settings_of(
                    PreferenceRecipe, recipe, settings, preferences=preferences,
                    first=lambda fields: show_code(console, loss=fields.get("loss")),
                )  # fmt: skip
                plan = plan_preferences(made)
                with console.status("reading the preferences into the model's tokens"):
                    run = open_preferences(plan)
            with kept(run, stop):
                _show(run, console, stop)
    except FinishedError as done:
        console.print(str(done), soft_wrap=True, highlight=False, markup=False)
        if as_json:
            print_json(done.summary | {"folder": str(resume)})
        return
    if as_json:
        print_json(run.summary | {"folder": str(run.folder.path)})


def _show(run: PreferenceRun, console: Console, stop: Stopping) -> None:
    """The run from its opening to its closing words."""
    console.print(_opening(run), highlight=False, soft_wrap=True, markup=False)
    with Busy(console) as busy:
        busy.about("held-out preferences before training")
        run.start()
        for note in run.going_on.notes:
            console.print("note      " + note, highlight=False, soft_wrap=True, markup=False)
        busy.about("training")
        for step in learn_preferences(run):
            figures = [(name, form.format(step.record[key])) for key, name, form in _FIGURES if key in step.record]
            console.print(step_line(step.index + 1, run.steps, figures), highlight=False, soft_wrap=True)
            if step.record["skipped_updates"]:
                console.print("  ! update skipped: gradient not finite", highlight=False)
            busy.told()
            busy(f"step {min(step.index + 2, run.steps)}", step.index + 1, run.steps)
            stop.check()
        busy.about("held-out preferences after training")
        run.finish()
    console.print(_table(run.summary["held_out"]))
    for sentence in verdict(run.summary):
        console.print(sentence, highlight=False, soft_wrap=True)
    console.print(f"The policy: {run.folder.path / 'policy'}   all figures: {run.folder.path}", highlight=False)


def _opening(run: PreferenceRun) -> str:
    def block(name: str, text: str) -> str:
        return f"{name:<10}" + text.replace("\n", "\n" + " " * 10)

    prompts = {e.prompt.id: e.prompt for e in (*run.train.examples, *run.held_out.examples)}
    fields = who_reads(run.learner.policy, prompts.values())
    lines = [
        block("train", run.train.report()),
        block("held out", run.held_out.report()),
        *([block("fields", "\n".join(fields))] if fields else []),
        *(block("note", note) for note in run.notes),
        block("batch", f"{len(run.batches)} steps of about {run.recipe.preferences_per_step} {run.train.form}"),
        block("loss", str(run.learner.loss)),
        block("run", str(run.folder.path)),
    ]
    return "\n".join(lines)


def _table(held_out: dict[str, Any]) -> Table:
    table = Table(title=f"Held-out preferences (n = {held_out['before']['accuracy']['n']} prompts)")
    for name in ("", "accuracy", "95% interval", "log p(chosen)", "log p(rejected)"):
        table.add_column(name, justify="left" if not name else "right")
    for when in ("before", "after"):
        row = held_out[when]
        texts = (f"{row[side]:.2f}" for side in ("chosen_logp", "rejected_logp"))
        table.add_row(when, *_interval(row["accuracy"], ""), *texts)
    change = held_out["difference"]
    texts = (_interval(change[side], "+")[0] for side in ("chosen_logp", "rejected_logp"))
    table.add_row("difference", *_interval(change["accuracy"], "+"), *texts)
    return table


def _interval(row: dict[str, Any], sign: str) -> tuple[str, str]:
    def figure(x: float | None) -> str:
        return "?" if x is None else f"{x:{sign}.3f}"

    return figure(row["mean"]), in_words(row, f"{sign}.3f")

"""A run on preferences: its opening, its steps, its end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from lossmith.durable.stopping import Stopping
from lossmith.intervals import in_words
from lossmith.report.run.closing import what_next
from lossmith.report.run.live import step_line
from lossmith.report.run.opening import about_adapter
from lossmith.report.run.prompts import who_reads
from lossmith.report.run.tracking import Tracking
from lossmith.report.run.waiting import Busy
from lossmith.terminal import put_table
from lossmith.training.offline.loop import PreferenceRun, PreferenceStep, learn_preferences
from lossmith.training.offline.preference_scores import verdict

__all__ = ["show_preference_run"]

_FIGURES = (
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "accuracy", "{:.2f}"),
    ("margin", "margin", "{:+.3f}"),
    ("chosen_log_ratio", "chosen", "{:+.3f}"),
    ("rejected_log_ratio", "rejected", "{:+.3f}"),
    ("grad_norm", "grad", "{:.2f}"),
)


def show_preference_run(run: PreferenceRun, console: Console, stop: Stopping) -> None:
    """The run from its opening to its closing words."""
    console.print(_opening(run), highlight=False, soft_wrap=True, markup=False)
    with Busy(console) as busy:
        busy.about("held-out preferences before training")
        run.start()
        for note in run.going_on.notes:
            console.print("note      " + note, highlight=False, soft_wrap=True, markup=False)
        busy.about("training")
        with Tracking(run, console) as tracking:
            for step in learn_preferences(run):
                _show(step, run, console, busy)
                tracking.step(step.record)
                stop.check()
            busy.about("held-out preferences after training")
            run.finish()
            tracking.end(run.summary["held_out"])
    put_table(console, _table(run.summary["held_out"]))
    for sentence in verdict(run.summary):
        console.print(sentence, highlight=False, soft_wrap=True)
    console.print(what_next(run.folder.path), highlight=False, markup=False, soft_wrap=True)


def _show(step: PreferenceStep, run: PreferenceRun, console: Console, busy: Busy) -> None:
    figures = [(name, form.format(step.record[key])) for key, name, form in _FIGURES if key in step.record]
    console.print(step_line(step.index + 1, run.steps, figures), highlight=False, soft_wrap=True)
    if step.record["skipped_updates"]:
        console.print("  ! update skipped: gradient not finite", highlight=False)
    busy.told()
    busy(f"step {min(step.index + 2, run.steps)}", step.index + 1, run.steps)


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
        *([] if run.policy.adapter is None else [block("adapter", about_adapter(run.policy))]),
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

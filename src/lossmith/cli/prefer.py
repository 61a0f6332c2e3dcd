"""`lossmith prefer`: a policy straight from preferences, without a reward model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from lossmith.report.code import show_code
from lossmith.training.preferences import (
    PreferenceRecipe,
    PreferenceRun,
    learn_preferences,
    open_preferences,
    plan_preferences,
    verdict,
)

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
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Train a policy on preferences: DPO, IPO, KTO and their kin, without a reward model.

    Parameters
    ----------
    preferences
        A preferences file (pairs, rankings, ratings or labels), or a database of judgements (.db).
    recipe
        A TOML file that sets any of the options below; options given here win over it.
    as_json
        Print the summary as JSON on standard output, everything else on standard error.
    """
    console = Console(stderr=as_json)
    given = {} if settings is None else {k: getattr(settings, k) for k in settings.model_fields_set}
    fields = ({} if recipe is None else PreferenceRecipe.read(recipe)) | given
    if preferences is not None:
        fields["preferences"] = preferences
    show_code(console, loss=fields.get("loss"))
    plan = plan_preferences(PreferenceRecipe.make(str(recipe or "command line"), **fields))
    with console.status("reading the preferences into the model's tokens"):
        run = open_preferences(plan)
    console.print(_opening(run), highlight=False, soft_wrap=True, markup=False)
    with console.status("measuring the untrained policy on the held-out preferences"):
        run.start()
    for step in learn_preferences(run):
        figures = "  ".join(
            f"{name} {form.format(step.record[key])}" for key, name, form in _FIGURES if key in step.record
        )
        skipped = "  ! update skipped: gradient not finite" if step.record["skipped_updates"] else ""
        line = f"step {step.index + 1:>3}/{len(run.batches)}  {figures}{skipped}"
        console.print(line, highlight=False, soft_wrap=True)
    with console.status("measuring the trained policy on the held-out preferences"):
        run.finish()
    console.print(_table(run.summary["held_out"]))
    for sentence in verdict(run.summary):
        console.print(sentence, highlight=False, soft_wrap=True)
    console.print(f"The policy: {run.folder.path / 'policy'}   all figures: {run.folder.path}", highlight=False)
    if as_json:
        print(json.dumps(run.summary | {"folder": str(run.folder.path)}))


def _opening(run: PreferenceRun) -> str:
    def block(name: str, text: str) -> str:
        return f"{name:<10}" + text.replace("\n", "\n" + " " * 10)

    lines = [
        block("train", run.train.report()),
        block("held out", run.held_out.report()),
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

    return figure(row["mean"]), f"{figure(row['ci95_low'])} to {figure(row['ci95_high'])}"

"""What a run says at its end: held-out performance before and after, and what the completions look like."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lossmith.errors import printable
from lossmith.intervals import in_words, verdict
from lossmith.policy import adapter_base
from lossmith.policy.quantized import quantization_of
from lossmith.rollouts import Rollout
from lossmith.terminal import put_table
from lossmith.training import Run
from lossmith.training.evaluate import sentences

__all__ = ["closing", "what_next"]


def closing(run: Run, summary: dict[str, Any], console: Console, examples: int = 3) -> None:
    """Print the table, the verdict and the first held-out prompts' completions before and after."""
    held_out = summary["held_out"]
    if "stopped" in summary:
        console.print(f"Stopped early: {summary['stopped']}.", highlight=False, soft_wrap=True)
    put_table(console, _table(held_out, "Held-out prompts"))
    for sentence in sentences(summary):
        console.print(sentence, highlight=False, markup=False)
    for finding in summary.get("findings", ()):
        said = finding["sentence"]
        if finding["level"] != "note" and not finding["voids"] and said != summary.get("stopped"):
            told = f"{said[0].upper()}{said[1:]} ({finding['detector']})."
            console.print(told, highlight=False, markup=False)
    if "watch" in summary:
        put_table(console, _table(summary["watch"], "The same completions, by the scorer that watches"))
        console.print(verdict(summary["watch"]["difference"], "watched score"), highlight=False)
    assert run.before is not None and run.after is not None
    pairs = list(zip(run.before.rollouts, run.after.rollouts, strict=True))
    for first, second in pairs[:examples]:
        console.print(_example(first, second))
    console.print(what_next(run.folder.path), highlight=False, markup=False, soft_wrap=True)


def what_next(folder: Path) -> str:
    """Where everything is, how to talk to the policy, and how to use it elsewhere."""
    run, policy = (shlex.quote(str(place)) for place in (folder, folder / "policy"))
    lines = {
        "the policy": policy,
        "all figures": run,
        "talk to it": f"lossmith chat {run}   (before and after, side by side)",
        "one prompt": f'lossmith sample --prompt "..." --model {policy}',
        **_elsewhere(folder, run, policy),
        "to a hub": f"hf upload YOU/{shlex.quote(folder.name)} {policy}   (its model card is README.md in there)",
    }
    return "\n".join(f"{what:<13}{how}" for what, how in lines.items())


def _elsewhere(folder: Path, run: str, policy: str) -> dict[str, str]:
    loads = f"AutoModelForCausalLM.from_pretrained({str(folder / 'policy')!r})"
    if adapter_base(folder / "policy") is None:
        return {"elsewhere": f"{loads}, vllm serve {policy}"}
    needs = "peft" if quantization_of(folder / "policy") is None else "peft and the quantization in its README.md"
    return {"elsewhere": f"{loads}, with {needs}", "one model": f"lossmith merge {run} -o FOLDER, vllm serve FOLDER"}


def _table(held_out: dict[str, Any], title: str) -> Table:
    table = Table(title=f"{title} (n = {held_out['before']['n']}, same prompts and seeds)")
    for name in ("", "score", "95% interval", "ended in time", "tokens"):
        table.add_column(name, justify="left" if not name else "right")
    for when in ("before", "after"):
        row = held_out[when]
        table.add_row(when, _figure(row["mean"]), _range(row), f"{row['ended']:.0%}", f"{row['mean_length']:.1f}")
    change = held_out["difference"]
    table.add_row("difference", _figure(change["mean"], "+"), _range(change, "+"), "", "")
    return table


def _range(row: dict[str, Any], sign: str = "") -> str:
    return in_words(row, f"{sign}.3f")


def _figure(x: float | None, sign: str = "") -> str:
    return "?" if x is None else f"{x:{sign}.3f}"


def _example(before: Rollout, after: Rollout) -> Panel:
    def one(name: str, rollout: Rollout) -> Text:
        value = rollout.score.value if rollout.score else None
        score = "no score" if value is None else f"{value:.3f}"
        cut = " […]" if rollout.truncated else ""
        return Text.assemble((f"{name} ({score})  ", "bold"), printable(rollout.completion.strip()) + cut)

    return Panel(
        Group(one("before", before), one("after ", after)),
        title=Text(printable(before.prompt.text)),
        title_align="left",
    )

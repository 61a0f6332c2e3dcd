"""`lossmith replay`: recorded rollouts through other losses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lossmith.cli.completion import A_LOSS
from lossmith.cli.losses import Json, example
from lossmith.cli.streams import print_json
from lossmith.errors import RunError, quiet_traps
from lossmith.files import check_writable
from lossmith.losses import CATALOGUE, Loss, loss_from_dict
from lossmith.policy import load_policy
from lossmith.replay import Recorded, Replay, read_recorded
from lossmith.replay import replay as through
from lossmith.replay.model import under_model
from lossmith.report.replay import plot_replay, replay_to_dict
from lossmith.terminal import Terminal, put_table
from lossmith.training.recipe import Recipe

__all__ = ["mapping_of", "replay"]

USUAL = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce", "pass_at_k", "dpo")


def replay(
    path: Path,
    /,
    *,
    loss: Annotated[tuple[str, ...], Parameter(name="--loss", completer=A_LOSS.completer)] = (),
    step: int | None = None,
    map: str = "",
    model: str | None = None,
    device: str = "auto",
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    as_json: Json = False,
) -> None:
    """Recorded rollouts through other losses: what each would have said of them, and pushed. No model is needed.

    Reads a run's folder, and parquet or JSON lines of TRL, verl, NeMo-RL, prime-rl, verifiers and open-instruct.

    Parameters
    ----------
    path
        A run's folder, a file of rollouts, or a folder of them.
    loss
        A loss, again for each further one: --loss grpo@trl --loss "dr_grpo(max_length=128)"; "all" is the catalogue.
        Otherwise the run's own and some well-known ones.
    step
        Which step of several, as the file numbers it (step-00012 is 12). Otherwise the last.
    map
        Which column is which field, for a file of your own: reward=score,completion=text,group=question.
    model
        A model to ask too: ratios, KL, entropy, and each loss's gradient in its parameters.
    device
        Where that model is computed.
    output
        Image to write: .svg, .png or .pdf.
    as_json
        Print JSON, with every completion's pull.
    """
    if output is not None:
        output = check_writable(output)
    record = _step(read_recorded(path, mapping_of(map)), step)
    with quiet_traps(), Terminal(stderr=True).status("replaying"):
        losses = _losses(path, record, loss)
        found = through(record, losses)
        if model is not None:
            evaluated = [x.loss for x in found.losses if not x.refused]
            under = under_model(record, evaluated, load_policy(model, device=device))
            found = dataclasses.replace(found, under_model=under)
    if output is not None:
        plot_replay(found, output)
    if as_json:
        print_json(replay_to_dict(found), indent=2)
        return
    _show(Terminal(), found)
    if output is not None:
        Terminal().print(f"wrote {output}", markup=False, highlight=False, soft_wrap=True)


def mapping_of(text: str) -> dict[str, str] | None:
    """--map as {field: column}; None where it is empty."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if any(not theirs for _, _, theirs in pairs):
        raise RunError(f"--map {text}: write field=column, and a comma between them.")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs} or None


def _step(steps: list[Recorded], asked: int | None) -> Recorded:
    by_number = {record.step: record for record in steps}
    if asked is None:
        return steps[-1]
    if asked not in by_number:
        raise RunError(f"--step {asked}: recorded are {', '.join(map(str, by_number))}.")
    return by_number[asked]


def _losses(path: Path, record: Recorded, asked: tuple[str, ...]) -> list[Loss]:
    if asked == ("all",):
        return [example(name) for name, entry in CATALOGUE.items() if not entry.preset_of]
    if asked:
        return [example(name) for name in asked]
    width = record.fields["mask"].shape[1]
    usual = [example(name) for name in USUAL]
    usual = [x.replace(max_length=width) if "max_length" in x.needs else x for x in usual]
    recipe = path / "recipe.toml"
    if not recipe.is_file():
        return usual
    own = Recipe.read(recipe)["loss"]
    mine = loss_from_dict(own) if isinstance(own, dict) else example(own)
    return [mine, *(x for x in usual if x.name != mine.name)]


def _show(console: Console, found: Replay) -> None:
    record = found.record
    groups = f"{int(record.fields['group'].unique().numel())} prompts, " if "group" in record.fields else ""
    console.print(
        f"[bold]{escape(record.source)}[/], step {record.step}: {len(record)} completions, {groups}"
        f"{int(record.fields['mask'].sum())} tokens  [dim]{escape(record.place)}[/]",
        highlight=False,
    )
    unknown = [
        name for name in ("old_logp", "behavior_logp", "ref_logp", "reward", "group") if name not in record.fields
    ]
    console.print(f"recorded: {', '.join(name for name in record.fields if name != 'mask')}", highlight=False)
    if unknown:
        console.print(f"not recorded: {', '.join(unknown)}", highlight=False)
    for note in record.notes:
        console.print(f"note: {escape(note)}", highlight=False)
    if found.effective_sample_size is not None:
        console.print(
            f"effective sample size of the weights π_old/π_behavior: {found.effective_sample_size:.1%} of the tokens",
            highlight=False,
        )
    put_table(console, _table(found))
    if len(found.evaluated) > 1:
        names = [x.name for x in found.evaluated]
        console.print(_matrix("cosine of the pulls -dL/dlogp, over all tokens", names, found.cosines))
    _show_model(console, found)
    for x in found.losses:
        if x.refused:
            console.print(f"[bold]{escape(x.name)}[/] not replayed: {escape(x.refused)}", highlight=False)
        for note in x.notes:
            console.print(f"[bold]{escape(x.name)}[/] {escape(note)}", highlight=False)


def _table(found: Replay) -> Table:
    table = Table(title="through each loss", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("loss", "value", "without pull", "pull~score", "pull~length", "clipped", "advantage"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    score, length = found.against("reward"), found.against("length")
    n = len(found.record)
    for x, of_score, of_length in zip(found.evaluated, score, length, strict=True):
        gap = x.advantage_gap
        table.add_row(
            escape(x.name),
            _number(x.value, ".4g"),
            f"{x.without_pull}/{n}",
            _number(of_score, "+.2f"),
            _number(of_length, "+.2f"),
            _number(x.clip_fraction, ".1%"),
            "–" if gap is None else "as recorded" if gap < 1e-5 else f"off by {gap:.2g}",
        )
    return table


def _number(x: float | None, form: str) -> str:
    return "–" if x is None else format(x, form)


def _matrix(title: str, names: list[str], cosines: torch.Tensor) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    for i in range(len(names)):
        table.add_column(str(i + 1), justify="right")
    for i, name in enumerate(names):
        table.add_row(f"{i + 1} {escape(name)}", *(f"{float(c):.2f}" for c in cosines[i]))
    return table


def _show_model(console: Console, found: Replay) -> None:
    under = found.under_model
    if under is None:
        return
    parts = [f"entropy {under.entropy:.3f} nats a token"]
    if under.ratio is not None:
        low, middle, high = under.ratio
        parts.append(f"ratio to the sampler {middle:.3f} (5% to 95% of the tokens: {low:.3f} to {high:.3f})")
        parts.append(f"KL {under.kl_behavior:.4f} nats a token")
        parts.append(f"effective sample size {under.effective_sample_size:.1%}")
    console.print("[bold]under the model[/]: " + ", ".join(parts), highlight=False)
    table = Table(
        title="gradient in its parameters", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    table.add_column("loss")
    table.add_column("|dL/dθ|", justify="right")
    for name, norm in under.grad_norm.items():
        table.add_row(escape(name), f"{norm:.4g}")
    put_table(console, table)
    if len(under.grad_norm) > 1:
        console.print(_matrix("cosine of dL/dθ", list(under.grad_norm), under.cosines))
    for name, why in under.refused.items():
        console.print(f"[bold]{escape(name)}[/] has no gradient here: {escape(why)}", highlight=False)

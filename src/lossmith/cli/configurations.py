"""`lossmith losses from FILE`: which loss a trainer's configuration is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape

from lossmith.adapters.configurations import TRAINERS, Reading, read
from lossmith.adapters.configurations.source import SUFFIXES
from lossmith.cli.audit import show_sections
from lossmith.cli.losses import Json, show_weights
from lossmith.cli.streams import print_json
from lossmith.errors import quiet_traps
from lossmith.proofs.auditing import audit
from lossmith.report.loss import RATIOS
from lossmith.report.loss.comparison import weights
from lossmith.terminal import Terminal

__all__ = ["from_", "is_configuration", "show_not_understood", "summary", "title"]


def from_(
    file: str,
    /,
    *,
    trainer: str | None = None,
    audit: Annotated[bool, Parameter(name="--audit")] = True,
    as_json: Json = False,
) -> None:
    """The loss that a trainer's configuration is: formula, weights, traps, and what it does by the audit.

    A setting that is not understood is named; the exit code is then 1, for the loss may be another one.

    Parameters
    ----------
    file
        A configuration of TRL, verl, OpenRLHF, SkyRL, prime-rl or NeMo-RL: YAML, JSON, TOML, the shell script that
        launches it, or for TRL the Python script with its GRPOConfig(...). Scripts are read, never run.
    trainer
        Whose configuration it is, where that is not clear from it: trl, verl, openrlhf, skyrl, prime_rl or nemo_rl.
    audit
        Measure what the loss does, ten seconds; --no-audit leaves it out.
    as_json
        Print JSON, without the audit.
    """
    reading = read(file, trainer)
    if as_json:
        print_json(summary(reading), indent=2)
    else:
        _show(reading, measured=audit)
    if reading.not_understood:
        sys.exit(1)


def is_configuration(name: str) -> bool:
    """Whether a name on the command line is a file to be read, and not a loss of the catalogue or of one's own."""
    return Path(name).suffix.lower() in SUFFIXES


def title(reading: Reading) -> str:
    return f"{TRAINERS[reading.trainer].title} {reading.version}"


def summary(reading: Reading) -> dict[str, Any]:
    """JSON types only."""
    tables = ("used", "defaults", "without_effect", "elsewhere", "not_understood")
    return {
        "trainer": reading.trainer,
        "version": reading.version,
        "why": reading.why,
        "loss": reading.call,
        "formula": reading.loss.formula(),
        "parameters": reading.loss.to_dict(),
        "ratios": RATIOS,
        "weights": weights(reading.loss),
        "traps": list(reading.loss.traps),
        "notes": list(reading.notes),
        **{name: {key: _plain(value) for key, value in getattr(reading, name).items()} for name in tables},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def show_not_understood(console: Console, reading: Reading) -> None:
    """Loudly: with one of these the loss may be another one."""
    if not reading.not_understood:
        return
    console.print(f"[bold red]not understood[/], so that the loss may be another one than [bold]{reading.call}[/]:")
    for name, why in reading.not_understood.items():
        console.print(f"  [red]{escape(name)}[/]: {escape(why)}", highlight=False)


def _show(reading: Reading, *, measured: bool) -> None:
    console = Terminal()
    why = f", {reading.why}" if reading.why else ""
    console.print(f"{reading.where}: {title(reading)}{why}", markup=False, highlight=False, style="dim")
    show_not_understood(console, reading)
    console.print(f"\n[bold]{escape(reading.call)}[/]\n")
    console.print(reading.loss.formula(), markup=False, highlight=False)
    for trap in reading.loss.traps:
        console.print(f"\n[bold red]trap[/]  {escape(trap)}.")
    for note in reading.notes:
        console.print(f"\n[bold]note[/]  {escape(note)}", highlight=False)
    _settings(console, "made by", reading.used)
    _settings(console, f"not set, so as {title(reading)} has it", reading.defaults)
    _settings(console, "set, without effect on this loss", reading.without_effect)
    _settings(console, "not of the loss", reading.elsewhere, values=False)
    show_weights(console, reading.loss)
    if measured:
        with quiet_traps(), Terminal(stderr=True).status("measuring what the loss does"):
            found = audit(reading.loss)
        show_sections(console, found)


def _settings(console: Console, what: str, table: Mapping[str, Any], *, values: bool = True) -> None:
    if table:
        listed = ", ".join(f"{k}={v}" if values else k for k, v in table.items())
        console.print(f"\n[bold]{what}[/]: {escape(listed)}", highlight=False)

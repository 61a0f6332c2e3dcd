"""`lossmith chat`: talk to a policy, or to a run's before and after."""

from __future__ import annotations

import sys

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from lossmith.chat import Side, open_sides
from lossmith.errors import PolicyError, printable
from lossmith.policy import SamplingSettings
from lossmith.terminal import Terminal

__all__ = ["chat"]


def chat(
    *places: str,
    max_tokens: int = 200,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Talk to a policy line by line; of a run, to its model before and after, with the same words.

    An empty line or Ctrl-D ends it, /new begins a new conversation. Lines may also come through a pipe.

    Parameters
    ----------
    places
        One or two of: 'default', a model's folder, a hub name; or one run's folder.
    max_tokens
        Token budget of an answer.
    temperature
        Sampling temperature; 0 takes the likeliest token.
    top_p
        Nucleus: the smallest set of tokens with this probability; 1 is off.
    seed
        Decides what is sampled.
    device
        auto, cpu, cuda, mps, ...
    dtype
        Compute type: auto, float32 or bfloat16.
    """
    settings = SamplingSettings(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    console = Terminal(soft_wrap=True)
    sides = open_sides(places, device=device, dtype=dtype)
    console.print(
        f"[dim]{' and '.join(s.name for s in sides)}; an empty line ends it, /new begins anew[/]", highlight=False
    )
    turn = 0
    while text := _line(console):
        if text == "/new":
            for side in sides:
                side.messages = []
            continue
        try:
            _answer(console, sides, text, settings, seed + turn)
        except PolicyError as error:
            console.print(f"[bold red]error:[/] {error}", highlight=False, markup=True)
        turn += 1


def _line(console: Console) -> str:
    """What the person says next; "" at the end."""
    if sys.stdin.isatty():
        try:
            return console.input("[bold]> [/]").strip()
        except EOFError:
            return ""
    line = sys.stdin.readline().strip()
    if line:
        console.print(f"> {line}", markup=False, highlight=False)
    return line


def _answer(console: Console, sides: list[Side], text: str, settings: SamplingSettings, seed: int) -> None:
    """Every side's answer, as it is written where there is a terminal."""
    said = dict.fromkeys((side.name for side in sides), "")

    def panels() -> Columns | Text:
        if len(sides) == 1:
            return Text(printable(said[sides[0].name]))
        width = max(20, console.width // len(sides) - 2)
        return Columns([Panel(Text(printable(t)), title=Text(name), width=width) for name, t in said.items()])

    if not console.is_terminal or console.is_dumb_terminal:
        for side in sides:
            answer = side.reply(text, settings, seed=seed)
            console.print(f"{side.name}: {printable(answer)}", markup=False, highlight=False)
        return
    with Live(panels(), console=console, refresh_per_second=12, vertical_overflow="visible") as live:
        for side in sides:

            def heard(so_far: str, name: str = side.name) -> None:
                said[name] = so_far
                live.update(panels())

            side.reply(text, settings, seed=seed, on_text=heard)

"""`lossmith explore` and `lossmith tour`: losses on a local page."""

from __future__ import annotations

import contextlib
import webbrowser
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

__all__ = ["explore", "tour"]

Open = Annotated[bool, Parameter(name="--browser", negative="--no-browser")]


def explore(*losses: str, port: int = 0, browser: Open = True, export: Path | None = None, view: str = "") -> None:
    """See what a loss does: its formula, its weight, a group, a step, and the truth, on a local page.

    Parameters
    ----------
    losses
        Up to four to begin with: "grpo", "rloo(beta=0.1)", "grpo@trl", "my.py:mine".
    port
        Port of the page on this machine; 0 takes a free one.
    browser
        Open the page in the browser.
    export
        Write the view to this HTML file instead of serving it.
    view
        With --export: the address of the view, or what stands after its question mark.
    """
    from lossmith.errors import LossError
    from lossmith.explorer import export_view

    if view and export is None:
        raise LossError("--view says what to --export FILE; no file is given.")
    if export is not None:
        _say(f"wrote {export_view(export, losses, view)}")
        return
    _serve(list(losses), port, browser, walk=False)


def tour(loss: str = "grpo", /, *, port: int = 0, browser: Open = True) -> None:
    """A guided walk through RLHF in ten pages, for whoever has never seen it; every page can be changed.

    Parameters
    ----------
    loss
        The loss to walk with.
    port
        Port of the page on this machine; 0 takes a free one.
    browser
        Open the page in the browser.
    """
    _serve([loss], port, browser, walk=True)


def _serve(losses: list[str], port: int, browser: bool, *, walk: bool) -> None:
    from lossmith.explorer import serve

    def ready(link: str) -> None:
        _say(f"the page is at {link}\nCtrl+C stops it. The address holds the view: keep it, or share it.")
        if browser:
            webbrowser.open(link)

    with contextlib.suppress(KeyboardInterrupt):
        serve(losses, tour=walk, port=port, on_ready=ready)


def _say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)

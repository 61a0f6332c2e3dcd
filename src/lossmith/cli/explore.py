"""`lossmith explore` and `lossmith tour`: losses on a local page."""

from __future__ import annotations

import contextlib
from pathlib import Path

from rich.console import Console

__all__ = ["explore", "tour"]


def explore(*losses: str, port: int = 0, export: Path | None = None, view: str = "") -> None:
    """See what a loss does: its formula, its weight, a group, a step, and the truth, on a local page.

    Parameters
    ----------
    losses
        Up to four to begin with: "grpo", "rloo(beta=0.1)", "grpo@trl", "my.py:mine".
    port
        Port of the page on this machine; 0 takes a free one.
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
    _serve(list(losses), port, walk=False)


def tour(loss: str = "grpo", /, *, port: int = 0) -> None:
    """A guided walk through RLHF in ten pages, for whoever has never seen it; every page can be changed.

    Parameters
    ----------
    loss
        The loss to walk with.
    port
        Port of the page on this machine; 0 takes a free one.
    """
    _serve([loss], port, walk=True)


def _serve(losses: list[str], port: int, *, walk: bool) -> None:
    from lossmith.explorer import serve

    with contextlib.suppress(KeyboardInterrupt):
        serve(losses, tour=walk, port=port, on_ready=lambda link: _say(f"open {link}\nCtrl+C stops."))


def _say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)

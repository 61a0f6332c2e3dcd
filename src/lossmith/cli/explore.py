"""`lossmith explore`: a window into a loss."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

from cyclopts import Parameter
from rich.console import Console

__all__ = ["explore"]


def explore(
    *losses: str,
    port: int = 0,
    browser: Annotated[bool, Parameter(name="--browser", negative="--no-browser")] = True,
    export: Path | None = None,
) -> None:
    """See a loss on a local page: its formula, its weight, what it tells a group, the steps it takes.

    Parameters
    ----------
    losses
        Up to four, to look at side by side: grpo "dapo(clip_high=0.4)" grpo@trl my.py:loss. grpo and dapo if not given.
    port
        Port of the page; 0 takes a free one.
    browser
        Open the page in the browser.
    export
        Write the view to this HTML file instead, which needs no server.
    """
    from lossmith.explorer import export_view, serve
    from lossmith.explorer.chosen import build
    from lossmith.losses.catalogue.call import read_call

    query = urlencode([("loss", call) for call in losses])
    own = {name for name in (read_call(call)[0] for call in losses) if ":" in name}
    for call in losses:
        build(call)  # refused here, before there is a page to say it on
    if export is not None:
        path = export_view(query, export, own)
        Console().print(f"the view is in {path}", highlight=False, markup=False, soft_wrap=True)
        return

    def ready(link: str) -> None:
        text = f"the explorer is at {link}\nCtrl+C stops it. The address holds the view: keep it, or share it."
        Console().print(text, highlight=False, markup=False, soft_wrap=True)
        if browser:
            webbrowser.open(link)

    serve(query, port=port, own=own, on_ready=ready)

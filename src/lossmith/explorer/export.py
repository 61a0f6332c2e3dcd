"""A view as one file: what the page shows on every screen, drawn by the same scripts, with nothing left to ask for."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Collection
from pathlib import Path

from markupsafe import Markup

from lossmith.errors import AddressError
from lossmith.explorer.server import static, template
from lossmith.explorer.shown import view
from lossmith.explorer.state import MOST_LOSSES, SCREENS, read_state
from lossmith.explorer.truth import truth
from lossmith.files import check_writable, write_atomically

__all__ = ["export_view"]


def export_view(query: str, output: str | Path, own: Collection[str] = ()) -> Path:
    """Write the view of an address as one HTML file that asks no network; returns its place.

    AddressError: an address that means nothing, or a name that does not end in .html.
    """
    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise AddressError(f"{str(output)!r}: a view is an .html file.")
    target = check_writable(output)
    state = read_state(query, own)
    truth([c["call"] for c in view(state)["losses"] if not c["error"]], state, patience=math.inf)
    views = [view(dataclasses.replace(state, screen=screen)) for screen in SCREENS]
    data = json.dumps({"first": state.screen, "views": views}, ensure_ascii=True).replace("<", "\\u003c")
    script = "\n".join(static(name) for name in ("charts.js", "screens.js", "explorer.js"))
    still = {
        "style": Markup(static("page.css") + static("explorer.css")),
        "script": Markup(script),
        "hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": Markup(data),
        "query": state.query(),
    }
    write_atomically(target, template().render(screens=SCREENS, most=MOST_LOSSES, still=still))
    return target

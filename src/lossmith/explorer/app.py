"""The explorer's one route, its files, and a view as a file of its own."""

from __future__ import annotations

import base64
import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment
from markupsafe import Markup
from starlette.exceptions import HTTPException

from lossmith import __version__
from lossmith.errors import AddressError, LossError
from lossmith.explorer.address import FIELDS, PARTS, SCREENS, State
from lossmith.explorer.chosen import Own, chosen_losses, load_own
from lossmith.explorer.controls import controls
from lossmith.explorer.drawing import figure, signed
from lossmith.explorer.screens import group, loss, step, truth, weight
from lossmith.explorer.tour import PAGES, START, tour_view
from lossmith.files import check_writable, write_atomically
from lossmith.serving.guard import Guard, host_names
from lossmith.serving.listening import listen
from lossmith.serving.server import run, spelled
from lossmith.serving.style import HOUSE_STYLE
from lossmith.serving.text import visible
from lossmith.templates import templates_of

__all__ = ["export_view", "make_app", "serve"]

HOST = "127.0.0.1"
LONGEST = 16 * 1024  # characters of an address
DEFAULT = ("grpo", "dr_grpo")
VIEWS = {"loss": loss, "weight": weight, "group": group, "step": step, "truth": truth}
_HERE = Path(__file__).parent
_STATIC = {  # fixed names, read once: no path of a request reaches the file system
    "house.css": "text/css; charset=utf-8",
    "explorer.css": "text/css; charset=utf-8",
    "explorer.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def serve(
    losses: Sequence[str] = (),
    *,
    tour: bool = False,
    port: int = 0,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Blocks until Ctrl+C. losses: what is shown first; code of one's own only if it is named here.

    port 0: a free one. on_ready gets the link. LossError: a loss that there is not, or the port is taken.
    """
    app = make_app(losses)
    with listen(HOST, port, LossError) as listener:
        start = first_view(losses, tour)
        if on_ready is not None:
            on_ready(f"http://{spelled(HOST)}:{listener.getsockname()[1]}/{start}")
        run(app, listener, "The page keeps nothing: reload it.")


def first_view(losses: Sequence[str], tour: bool = False) -> str:
    """The address that the page is opened with."""
    pairs = [("tour", "1")] if tour else []
    return "?" + urlencode([*pairs, *(("loss", spec) for spec in losses or ((START,) if tour else DEFAULT))])


def make_app(losses: Sequence[str] = ()) -> FastAPI:
    """The page as an ASGI app. LossError: one of the losses cannot be read."""
    own = load_own(list(losses))
    state = State(tuple(("loss", spec) for spec in losses))
    _refuse(state, chosen_losses(state, own))
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.own, app.state.lock = own, threading.Lock()
    app.include_router(_routes)
    app.add_middleware(Guard, hosts=host_names(HOST))
    app.add_exception_handler(HTTPException, _no_such_page)
    return app


def export_view(output: str | Path, losses: Sequence[str] = (), view: str = "") -> Path:
    """Write a view as one HTML file that asks for nothing; returns its place.

    view: an address of the page, or what stands after its question mark. AddressError, LossError: it cannot be shown
    as it says.
    RunError: the file cannot be written.
    """
    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise LossError(f"{str(output)!r}: a view is written to an .html file.")
    target = check_writable(output)
    query = urlsplit(view).query if "?" in view else view
    pairs = parse_qsl(query, keep_blank_values=True)
    pairs = [*pairs, *(("loss", spec) for spec in losses)] or [("loss", spec) for spec in DEFAULT]
    own = load_own(list(losses))
    state = State(tuple(pairs))
    values = _whole(state, own)
    _refuse(state, values["losses"])
    write_atomically(target, _static_page(values))
    return target


def _refuse(state: State, losses: list[Any]) -> None:
    """AddressError, LossError: what a page would say beside the view."""
    for problem in state.problems:
        raise AddressError(problem)
    for one in losses:
        if one.error:
            raise LossError(one.error)


# -- a view -----------------------------------------------------------------------------------------------------------


def _values(state: State, own: Own) -> dict[str, Any]:
    """All that the template says."""
    losses = chosen_losses(state, own)
    specs = [one.spec for one in losses]
    screen, page = state["screen"], state["tour"]
    values: dict[str, Any] = {"tour": None}
    if page:
        values["tour"] = tour_view(state, losses)
        screen, shown = values["tour"]["screen"], values["tour"]["shown"]
        values["view"] = values["tour"]["view"]
    else:
        shown, values["view"] = VIEWS[screen].SHOWN, VIEWS[screen].view(state, losses)
    pages = [(p, title, state.query(specs, tour=p)) for p, title in enumerate(PAGES, 1)]
    return values | {
        "screen": screen,
        "losses": losses,
        "controls": {one.place: controls(one) for one in losses},
        "found": loss.found_in_catalogue(state, losses),
        "links": {s: state.query(specs, screen=s, tour=0) for s in SCREENS},
        "parts": {p: (title, state.query(specs, part=p)) for p, title in PARTS.items()},
        "pages": pages,
        "without": {o.place: state.query(specs[: o.place] + specs[o.place + 1 :] or [""]) for o in losses},
        "address": state.query(specs),
        "fields": FIELDS,
        "shown": shown,
        "hidden": [(n, state.text(n)) for n, f in FIELDS.items() if n not in shown and state[n] != f.default],
        "state": state,
        "problems": list(dict.fromkeys(state.problems)),
        "link": lambda **changes: state.query(specs, **changes),
        "link_to": lambda others: state.query(others),
        "version": __version__,
        "static": False,
    }


def _whole(state: State, own: Own) -> dict[str, Any]:
    """The values of a view that goes no further: a page asks again for what there was no time for, a file cannot."""
    while (values := _values(state, own))["view"].get("more"):
        pass
    return values


@cache
def _templates() -> Environment:
    environment = templates_of("lossmith.explorer")
    environment.filters |= {"n": figure, "s": signed, "visible": visible}
    environment.globals |= {
        "zip": zip,
        "log10": lambda x: round(math.log10(x), 4),
        "times": math.exp,
        "tens": lambda x: round(-x / math.log(10)),
    }
    environment.globals["screens"] = SCREENS
    return environment


def _static_page(values: dict[str, Any]) -> str:
    style = HOUSE_STYLE.read_text("utf-8") + (_HERE / "static" / "explorer.css").read_text("utf-8")
    script = (_HERE / "static" / "explorer.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"static": True, "style": Markup(style), "script": Markup(script), "script_hash": digest}
    return _templates().get_template("page.html").render(**values | parts)


# -- requests ---------------------------------------------------------------------------------------------------------

_routes = APIRouter()


@_routes.get("/")
def view(request: Request) -> Response:
    """The view of this address; with `save`, as a file."""
    query = request.url.query
    if len(query) > LONGEST:
        return _message(HTTPStatus.REQUEST_URI_TOO_LONG, "That address is too long", "Open the page without it.")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="replace", max_num_fields=300)
    except ValueError:
        return _message(HTTPStatus.BAD_REQUEST, "Too many fields", "No view of this page has that many.")
    save = any(name == "save" for name, _ in pairs)
    pairs = [pair for pair in pairs if pair[0] != "save"] or [("loss", spec) for spec in DEFAULT]
    with request.app.state.lock:  # one at a time: warnings are quieted for a whole process
        state, own = State(tuple(pairs)), request.app.state.own
        if save:
            html = _static_page(_whole(state, own))
        else:
            html = _templates().get_template("page.html").render(**_values(state, own))
    headers = {"content-disposition": 'attachment; filename="view.html"'} if save else {}
    return HTMLResponse(html, headers=headers)


@_routes.get("/static/{file}")
def static(file: str) -> Response:
    if file not in _STATIC:
        raise HTTPException(404)
    place = HOUSE_STYLE if file == "house.css" else _HERE / "static" / file
    return Response(place.read_bytes(), media_type=_STATIC[file])


def _no_such_page(request: Request, error: Exception) -> Response:
    status = HTTPStatus(getattr(error, "status_code", 404))
    return _message(status, status.phrase, "There is nothing here.")


def _message(status: HTTPStatus, title: str, text: str) -> Response:
    return HTMLResponse(_templates().get_template("message.html").render(title=title, text=text), status)

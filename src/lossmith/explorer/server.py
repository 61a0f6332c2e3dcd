"""The page, served to this machine alone until it is stopped. It stores nothing, and every request is checked.

Requests for a view are POSTs, because the guard refuses those of another site; they change nothing.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jinja2
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from lossmith.errors import AddressError, LossmithError
from lossmith.explorer.formulas import catalogue
from lossmith.explorer.shown import after_change, view
from lossmith.explorer.state import MOST_LOSSES, SCREENS, read_state
from lossmith.feedback.page.guard import LoginGuard, host_names

__all__ = ["make_app", "serve", "static", "template"]

LARGEST = 64 * 1024  # bytes of a request
_HERE = Path(__file__).parent
_HOUSE = _HERE.parent / "feedback" / "page" / "static"  # the style of the page where people judge
_STATIC = {  # fixed names, read once: no path of a request reaches the file system
    "page.css": (_HOUSE, "text/css; charset=utf-8"),
    "icon.svg": (_HOUSE, "image/svg+xml"),
    "explorer.css": (_HERE / "static", "text/css; charset=utf-8"),
    "charts.js": (_HERE / "static", "text/javascript; charset=utf-8"),
    "screens.js": (_HERE / "static", "text/javascript; charset=utf-8"),
    "explorer.js": (_HERE / "static", "text/javascript; charset=utf-8"),
}


def static(name: str) -> str:
    return (_STATIC[name][0] / name).read_text(encoding="utf-8")


def template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lossmith.explorer"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("explorer.html")


def make_app(own: Collection[str] = ()) -> FastAPI:
    """The page as an ASGI app. own: losses of the user's own code, named on the command line."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.own = frozenset(own)
    app.state.lock = threading.Lock()  # one view at a time: torch uses the cores itself, and `ast` bears no two threads
    app.state.page = template().render(screens=SCREENS, most=MOST_LOSSES, still=None)
    app.state.static = {name: static(name) for name in _STATIC}
    app.include_router(_routes)
    app.add_middleware(LoginGuard, hosts=host_names("127.0.0.1"))
    app.add_exception_handler(LossmithError, _refused)
    app.add_exception_handler(HTTPException, _no_such_page)
    return app


def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 422)


def _no_such_page(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    return HTMLResponse(f"<!doctype html><title>Lossmith</title><p>There is nothing here ({status}).", status)


_routes = APIRouter()


@_routes.get("/")
def page(request: Request) -> Response:
    return HTMLResponse(request.app.state.page)


@_routes.get("/static/{name}")
def file(request: Request, name: str) -> Response:
    if name not in _STATIC:
        raise HTTPException(404)
    return Response(request.app.state.static[name], media_type=_STATIC[name][1])


@_routes.get("/catalogue")
def losses() -> Response:
    return JSONResponse(catalogue())


@_routes.post("/view")
async def shown_view(request: Request) -> Response:
    """{query, change: {index, name, value} or absent} -> what the page shows."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST:
            raise AddressError(f"a request has at most {LARGEST} bytes.")
    return JSONResponse(await _off_the_loop(request.app, body))


async def _off_the_loop(app: FastAPI, body: bytes) -> dict[str, Any]:
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(_answer, app, body)


def _answer(app: FastAPI, body: bytes) -> dict[str, Any]:
    query, change = _asked(body)
    with app.state.lock:
        state = read_state(query, app.state.own)
        return view(state if change is None else after_change(state, *change))


def _asked(body: bytes) -> tuple[str, tuple[int, str, Any] | None]:
    """(query, change). AddressError: not what the page sends."""
    try:
        asked = json.loads(body)
        query, change = asked["query"], asked.get("change")
        if change is not None:
            change = (change["index"], change["name"], change["value"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise AddressError("this request is not one of this page.") from None
    if not isinstance(query, str) or (change and (type(change[0]) is not int or not isinstance(change[1], str))):
        raise AddressError("this request is not one of this page.")
    return query, change


def serve(
    query: str = "",
    *,
    port: int = 0,
    own: Collection[str] = (),
    on_ready: Callable[[str], None] = lambda link: None,
) -> None:
    """Blocks until Ctrl+C. port 0: a free one. `on_ready` gets the link of the view.

    AddressError: an address that means nothing, or a port that is taken.
    """
    read_state(query, own)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with listener:
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except (OSError, OverflowError) as error:
            raise AddressError(
                f"the page cannot be served on port {port}: {error}. Choose another port, or 0 for a free one."
            ) from None
        on_ready(f"http://127.0.0.1:{listener.getsockname()[1]}/" + (f"?{query}" if query else ""))
        settings = uvicorn.Config(
            make_app(own),
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=2,
        )
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has stopped cleanly by then, and passes it on
            uvicorn.Server(settings).run(sockets=[listener])

"""The page's routes: a name, an item, an answer, an undo. Server-rendered; plain forms, so it works without scripts."""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from statistics import median
from typing import Annotated, Any, get_args
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lossmith import __version__
from lossmith.errors import FeedbackError, nearest
from lossmith.feedback.judgement import SCALES, Judgement, Question
from lossmith.feedback.output_set import OutputSet
from lossmith.feedback.page.accounts import LONGEST_NAME, Throttle, clean_name, matches
from lossmith.feedback.page.answer import Refused, read_answer, undo_of
from lossmith.feedback.page.session import Session, Sessions
from lossmith.feedback.page.work import Desk, items_of
from lossmith.feedback.store import Store
from lossmith.files import sha256
from lossmith.prompts import message_text
from lossmith.serving.guard import Guard, host_names
from lossmith.serving.style import HOUSE_STYLE
from lossmith.serving.text import visible
from lossmith.templates import templates_of

__all__ = ["DEFAULT_CRITERIA", "Page", "make_app"]

DEFAULT_CRITERIA = """\
Clarity: is it easy to follow, in order, and no longer than it needs to be?
Relevance: does it answer what was asked, all of it, and nothing else?
Accuracy: is what it says true, and does it admit what it cannot know?
Where these pull apart, accuracy weighs most. Length alone is no merit."""

LARGEST = 64 * 1024  # bytes of a request
_HERE = Path(__file__).parent
_STATIC = {  # fixed names, read once: no path of a request reaches the file system
    "house.css": "text/css; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "ranking.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


class Page:
    """What the routes share: the store, the items, the desks of the annotators, who is in."""

    def __init__(
        self,
        store: Store,
        sets: Sequence[OutputSet],
        question: Question,
        scale: str,
        criteria: str,
        sets_path: Path | None,
        accounts: bool,
        announce: Callable[[str], None] | None,
    ) -> None:
        self.store, self.question, self.scale, self.criteria, self.accounts = store, question, scale, criteria, accounts
        self.known = store.sets()
        self.items = items_of(sets, question)
        self.sessions = Sessions(announce)
        self.throttle = Throttle()
        self.hashing = ThreadPoolExecutor(2)  # passwords never take the threads that answers need
        self.file = _Watched(sets_path)
        self.cookie = "lossmith_" + hashlib.blake2b(str(store.path.resolve()).encode(), digest_size=4).hexdigest()
        files = {name: _HERE / "static" / name for name in _STATIC} | {"house.css": HOUSE_STYLE}
        self.static = {name: file.read_bytes() for name, file in files.items()}
        self.templates = templates_of("lossmith.feedback.page")
        self.templates.filters["visible"] = visible
        self._desks: dict[str, Desk] = {}
        self._lock = threading.Lock()  # the store's one connection, and the desks

    def desk(self, annotator: str) -> Desk:
        with self._lock:
            if annotator not in self._desks:
                judged = self.store.judgements(annotator)
                self._desks[annotator] = Desk(annotator, self.items, judged, self.question, self.scale)
            return self._desks[annotator]

    def annotators(self) -> list[str]:
        """Those who judged here before, and those who came in since the start."""
        with self._lock:
            judged = {j.annotator for j in self.store.judgements() if j.source == "person"}
            return sorted(judged | set(self._desks), key=str.casefold)

    def knows(self, annotator: str, password: str) -> bool:
        """Whether there is such an account with this password. Slow on purpose."""
        with self._lock:
            secret = self.store.accounts().get(annotator)
        return matches(password, secret)

    def write(self, desk: Desk, j: Judgement) -> None:
        """On the disk when it returns. FeedbackError: it could not be written, and nothing changed."""
        with self._lock:
            self.store.add([j], self.known)
        desk.record(j)

    def html(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.templates.get_template(template).render(**values), status)


class _Watched:
    """The sets file, and whether it still is what it was at the start."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._start, self._seen, self._changed = _checksum(path), _stamp(path), False

    def changed(self) -> bool:
        stamp = _stamp(self.path)
        if stamp != self._seen:  # read again only when its time or size moved
            self._seen, self._changed = stamp, _checksum(self.path) != self._start
        return self._changed


def _checksum(path: Path | None) -> str | None:
    try:
        return sha256(path) if path else None
    except OSError:
        return None


def _stamp(path: Path | None) -> tuple[int, int] | None:
    try:
        status = path.stat() if path else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size) if status else None


def make_app(
    store: Store,
    sets: Iterable[OutputSet],
    *,
    question: Question,
    scale: str = "1-5",
    criteria: str = DEFAULT_CRITERIA,
    sets_path: Path | None = None,
    accounts: bool = False,
    host: str = "127.0.0.1",
    announce: Callable[[str], None] | None = None,
) -> FastAPI:
    """The page as an ASGI app. The sets are added to the store.

    accounts: people sign in with a password of the store's accounts, instead of by a link that works once (its first
    token is `app.state.page.sessions.token`; `announce` is called with each later one).
    FeedbackError: an unknown question or scale, or sets in which there is nothing to compare.
    """
    sets = list(sets)
    if question not in get_args(Question):
        raise FeedbackError(f"there is no question {question!r}.{nearest(question, get_args(Question))}")
    if scale not in SCALES:
        raise FeedbackError(f"there is no scale {scale!r}.{nearest(scale, SCALES)}")
    if not items_of(sets, question):
        raise FeedbackError(
            f"no set holds two outputs, so there is no {question} to ask for. Sample with --n 2 or more."
        )
    store.add_sets(sets)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.page = Page(store, sets, question, scale, criteria, sets_path, accounts, announce)
    app.include_router(_routes)
    app.add_middleware(Guard, hosts=host_names(host), remote=accounts)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _no_such_page)
    app.add_exception_handler(ClientDisconnect, _gone)
    return app


# -- requests ---------------------------------------------------------------------------------------------------------


def _page(request: Request) -> Page:
    return request.app.state.page


def _session(request: Request) -> Session | None:
    page = _page(request)
    return page.sessions.get(request.cookies.get(page.cookie))


async def _form(request: Request) -> Mapping[str, str]:
    """The fields of a form that one of our own pages sent, in a session that is open."""
    size = request.headers.get("content-length", "0")
    if not size.isdecimal() or int(size) > LARGEST:
        raise _too_large()
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST:  # whatever its header said
            raise _too_large()
    try:
        fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=20)
    except ValueError:
        raise Refused(HTTPStatus.BAD_REQUEST, "Too many fields", "No page of this server sends that many.") from None
    form = {name: values[-1] for name, values in fields.items()}
    session = _session(request)
    if session is None:
        raise _signed_out()
    token = request.headers.get("x-csrf-token") or form.get("csrf", "")
    if not secrets.compare_digest(token.encode("utf-8", "surrogatepass"), session.csrf.encode()):
        raise Refused(HTTPStatus.FORBIDDEN, "Refused", "This form is from another session. Reload the page.")
    return form


Form = Annotated[Mapping[str, str], Depends(_form)]


def _too_large() -> Refused:
    return Refused(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "That is too long",
        f"An answer has at most {LARGEST // 1024} kB. Shorten it.",
    )


def _signed_out() -> Refused:
    return Refused(
        HTTPStatus.FORBIDDEN,
        "Open the link from the terminal",
        "This browser has not come in, or the server was started again since. The newest link is in the terminal "
        "in which lossmith annotate runs. Every answer that was acknowledged is stored.",
    )


def _desk(request: Request) -> tuple[Page, Session, Desk]:
    page, session = _page(request), _session(request)
    if session is None or session.annotator is None:
        raise _signed_out()
    return page, session, page.desk(session.annotator)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    values: dict[str, Any] = {"title": error.title, "text": str(error), "again": error.again}
    return _page(request).html("message.html", error.status, **values)


def _no_such_page(request: Request, error: Exception) -> Response:
    status = HTTPStatus(getattr(error, "status_code", 404))
    values: dict[str, Any] = {"title": status.phrase, "text": "There is nothing here.", "again": None}
    return _page(request).html("message.html", status, **values)


def _gone(request: Request, error: Exception) -> Response:
    """The client went away in the middle of its request: nobody reads this, and nothing went wrong here."""
    return Response(status_code=HTTPStatus.BAD_REQUEST)


def _home() -> RedirectResponse:
    return RedirectResponse("/", HTTPStatus.SEE_OTHER)


# -- coming in --------------------------------------------------------------------------------------------------------

_routes = APIRouter()


@_routes.get("/")
def home(request: Request, token: str | None = None) -> Response:
    page, session = _page(request), _session(request)
    if token is not None:
        return _come_in(request, token)
    if session is None:
        if not page.accounts:
            raise _signed_out()
        return _with_cookie(_home(), page, page.sessions.open()[0])
    if session.annotator is None:
        notice, session.notice = session.notice, ""
        values: dict[str, Any] = {"csrf": session.csrf, "longest": LONGEST_NAME, "notice": notice}
        if page.accounts:
            return page.html("login.html", title="Sign in", **values)
        return page.html("name.html", title="Who is judging?", known=page.annotators(), **values)
    return _work(page, session, page.desk(session.annotator))


def _come_in(request: Request, token: str) -> Response:
    """The link's token for a session. A browser that is in already uses nothing up."""
    page = _page(request)
    if page.accounts or _session(request) is not None:
        return _home()
    ahead = "prefetch" in request.headers.get("sec-purpose", "")  # nobody has opened it yet
    if ahead or not page.sessions.redeem(token):
        raise Refused(
            HTTPStatus.FORBIDDEN,
            "This link was used before",
            "A link works once. The newest one is in the terminal in which lossmith annotate runs; each time one "
            "is used, the next is printed there, for another browser or another annotator.",
        )
    return _with_cookie(_home(), page, page.sessions.open()[0])


def _with_cookie(response: Response, page: Page, cookie: str) -> Response:
    response.set_cookie(page.cookie, cookie, max_age=12 * 3600, httponly=True, samesite="strict")
    return response


@_routes.post("/name")
def name(request: Request, form: Form) -> Response:
    page, session = _page(request), _session(request)
    if page.accounts or session is None:
        raise _signed_out()
    try:
        wanted = clean_name(form.get("name", ""))
    except FeedbackError as error:
        session.notice = str(error)
        return _home()
    spelled = {known.casefold(): known for known in page.annotators()}  # "ada" goes on as "Ada"
    session.annotator = spelled.get(wanted.casefold(), wanted)
    return _home()


@_routes.post("/login")
async def login(request: Request, form: Form) -> Response:
    page, session = _page(request), _session(request)
    if not page.accounts or session is None:
        raise _signed_out()
    who, password = " ".join(form.get("name", "").split()), form.get("password", "")
    caller = request.client.host if request.client else "", who[:LONGEST_NAME]
    wait = page.throttle.enter(*caller)
    if wait:
        raise Refused(
            HTTPStatus.TOO_MANY_REQUESTS,
            "Wait a little",
            f"Too many wrong passwords. Try again in {math.ceil(wait)} seconds.",
        )
    good = await asyncio.get_running_loop().run_in_executor(page.hashing, page.knows, who, password)
    if not good:
        session.notice = "No account has this name and password."
        return _home()
    page.throttle.right(*caller)
    page.sessions.end(request.cookies.get(page.cookie))  # a cookie planted before is worth nothing after
    return _with_cookie(_home(), page, page.sessions.open(who)[0])


@_routes.post("/leave")
def leave(request: Request, form: Form) -> Response:
    """Another annotator sits down at the same browser."""
    session = _session(request)
    if session is not None:
        session.annotator = None
    return _home()


# -- working ----------------------------------------------------------------------------------------------------------


def _work(page: Page, session: Session, desk: Desk) -> Response:
    with desk.lock:
        shown, answers, last = desk.next(), desk.answers(), desk.last()
    notice, session.notice = session.notice, ""
    values: dict[str, Any] = {
        "csrf": session.csrf,
        "annotator": desk.annotator,
        "question": page.question,
        "criteria": page.criteria,
        "done": len(answers),
        "total": len(desk.items),
        "last": last.id if last else None,
        "changed": page.file.changed(),
        "notice": notice,
    }
    if shown is None:
        kinds = Counter(j.kind for j in answers.values())
        times = [j.seconds for j in answers.values() if j.seconds is not None]
        return page.html("done.html", title="All done", kinds=kinds, median=median(times) if times else None, **values)
    content = shown.item.of.prompt.content
    turns = [("prompt", content)] if isinstance(content, str) else [(m["role"], message_text(m)) for m in content]
    low, high = SCALES[page.scale]
    return page.html(
        f"{page.question}.html",
        title=f"{len(answers) + 1} of {len(desk.items)}",
        id=shown.id,
        turns=turns,
        outputs=[shown.item.of.output(one) for one in shown.outputs],
        scale=page.scale,
        low=low,
        high=high,
        **values,
    )


@_routes.post("/answer")
def answer(request: Request, form: Form) -> Response:
    page, _, desk = _desk(request)
    with desk.lock:
        name = form.get("id", "")
        if desk.judgement(name) is not None:  # the same click again, or an old page
            return _home()
        shown = desk.shown(name)
        if shown is None:
            raise Refused(HTTPStatus.CONFLICT, "That page is out of date", "Reload it to go on where you are.")
        judgement = read_answer(form, shown, desk, __version__)
        _write(page, desk, judgement, form, "/answer")
    return _home()


@_routes.post("/undo")
def undo(request: Request, form: Form) -> Response:
    page, _, desk = _desk(request)
    with desk.lock:
        last = desk.last()
        if last is not None and last.id == form.get("id"):  # else it was taken back before: a second click
            _write(page, desk, undo_of(last, __version__), form, "/undo")
    return _home()


def _write(page: Page, desk: Desk, j: Judgement, form: Mapping[str, str], action: str) -> None:
    try:
        page.write(desk, j)
    except FeedbackError as error:
        raise Refused(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "Not saved yet",
            f"Nothing was lost: your answer is still here, and can be sent again. {error}",
            (action, form),
        ) from None


@_routes.get("/static/{file}")
def static(request: Request, file: str) -> Response:
    page = _page(request)
    if file not in _STATIC:
        raise HTTPException(404)
    return Response(page.static[file], media_type=_STATIC[file])

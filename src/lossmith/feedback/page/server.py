"""The page, served until it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from lossmith.errors import FeedbackError
from lossmith.feedback.judgement import Question
from lossmith.feedback.output_set import OutputSet
from lossmith.feedback.page.app import DEFAULT_CRITERIA, make_app
from lossmith.feedback.page.connections import BACKLOG, Connection, Crowd, most_connections
from lossmith.feedback.page.guard import is_loopback
from lossmith.feedback.page.listening import QUEUE, listen
from lossmith.feedback.store import Store

__all__ = ["serve"]

_LOG = logging.getLogger(__name__)


def serve(
    sets: list[OutputSet],
    store_path: Path,
    *,
    sets_path: Path | None = None,
    question: Question,
    scale: str = "1-5",
    criteria: str = DEFAULT_CRITERIA,
    host: str = "127.0.0.1",
    port: int = 0,
    allow_remote: bool = False,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Blocks until Ctrl+C. port 0: a free one. `on_ready` gets the link, and the next link each time one was used up.

    On an address that others can reach there is no such link: annotators sign in with their accounts, and `on_ready`
    gets the plain address once.
    FeedbackError: another server runs on the file, the port is taken, an open address without accounts, nothing to ask.
    """
    with Store(store_path) as store, store.served():
        accounts = not is_loopback(host)
        if accounts:
            _may_be_remote(host, allow_remote, store)
        try:
            listener = listen(host, port)
        except (OSError, OverflowError) as error:
            raise FeedbackError(
                f"the page cannot be served on {host}, port {port}: {error}. Choose another port, or 0 for a free one."
            ) from None
        with listener:
            base = f"http://{_spelled(host)}:{listener.getsockname()[1]}/"
            ready = on_ready or (lambda link: None)
            app = make_app(
                store,
                sets,
                question=question,
                scale=scale,
                criteria=criteria,
                sets_path=sets_path,
                accounts=accounts,
                host=host,
                announce=lambda token: ready(f"{base}?token={token}"),
            )
            ready(base if accounts else f"{base}?token={app.state.page.sessions.token}")
            protocol: Any = functools.partial(Connection, Crowd(most_connections()))
            settings = uvicorn.Config(
                app,
                loop="asyncio",
                http=protocol,
                backlog=BACKLOG,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # else a header could say who is asking, and get round the throttle
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=3,
            )
            with (
                _quiet(),
                contextlib.suppress(KeyboardInterrupt),
            ):  # uvicorn has stopped cleanly by then, and passes it on
                _Server(settings).run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's, whose terminal belongs to the annotator: what goes wrong with connections is a line a minute."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(QUEUE)  # BACKLOG is how many are taken out of it at once
        self._said = -math.inf
        asyncio.get_running_loop().set_exception_handler(self._say)

    def _say(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._said > 60:
            self._said = time.monotonic()
            _LOG.warning(
                f"a connection was refused: {error.strerror or error}. Every answer that was acknowledged is stored."
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """uvicorn's errors are ours; its warnings are of what strangers send, and no annotator can do anything about it."""
    logger = logging.getLogger("uvicorn.error")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _may_be_remote(host: str, allowed: bool, store: Store) -> None:
    if not allowed:
        raise FeedbackError(
            f"on {host} others can reach the page. If that is meant, say so (--allow-remote); annotators then need "
            "accounts with passwords. For yourself, leave the host at 127.0.0.1."
        )
    if not store.accounts():
        raise FeedbackError(
            f"on {host} others can reach the page, and {store.path} has no accounts. Add one for each annotator first."
        )


def _spelled(host: str) -> str:
    """As a link has it. An address that means every address is no name: this machine's own is given."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return socket.gethostname()
    return f"[{host}]" if address.version == 6 else host

"""An app, served until it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import math
import socket
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from lossmith.serving.connections import BACKLOG, Connection, Crowd, most_connections
from lossmith.serving.listening import QUEUE

__all__ = ["run", "spelled"]

_LOG = logging.getLogger(__name__)


def run(app: Any, listener: socket.socket, reassurance: str) -> None:
    """Blocks until Ctrl+C. reassurance: what is true all the same where connections are refused, in a sentence."""
    protocol: Any = functools.partial(Connection, Crowd(most_connections()))
    settings = uvicorn.Config(
        app,
        loop="asyncio",
        http=protocol,
        backlog=BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # else a header could say who is asking, and get round a throttle
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=3,
    )
    with _quiet(), contextlib.suppress(KeyboardInterrupt):  # uvicorn has stopped cleanly by then, and passes it on
        _Server(settings, reassurance).run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's, whose terminal belongs to the user: what goes wrong with connections is a line a minute."""

    def __init__(self, config: uvicorn.Config, reassurance: str) -> None:
        super().__init__(config)
        self._reassurance = reassurance

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
            _LOG.warning(f"a connection was refused: {error.strerror or error}. {self._reassurance}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """uvicorn's errors are ours; its warnings are of what strangers send, and no user can do anything about it."""
    logger = logging.getLogger("uvicorn.error")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def spelled(host: str) -> str:
    """As a link has it. An address that means every address is no name: this machine's own is given."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return socket.gethostname()
    return f"[{host}]" if address.version == 6 else host

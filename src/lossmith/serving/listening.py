"""The socket that a page is served on."""

from __future__ import annotations

import socket

from lossmith.errors import LossmithError

__all__ = ["QUEUE", "listen"]

QUEUE = 1024  # connections that the system holds until they are accepted


def listen(host: str, port: int, error: type[LossmithError]) -> socket.socket:
    """Open for connections from now on, so that its link can be opened. port 0: a free one.

    `error`: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once, without waiting 40 ms for more, only where the protocol is named
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(QUEUE)
    except (OSError, OverflowError) as problem:
        listener.close()
        raise error(
            f"the page cannot be served on {host}, port {port}: {problem}. Choose another port, or 0 for a free one."
        ) from None
    return listener

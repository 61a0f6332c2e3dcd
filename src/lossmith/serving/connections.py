"""How long a client may take and how many there may be, so that stalled and vanished ones never put the page out.

uvicorn limits neither: it waits for the end of a request for as long as the client likes, and its own bound on
connections would turn the annotators away, since stalled ones count. Here a request has a deadline, and where all
places are taken, the one that has kept the server waiting longest gives its own up.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["BACKLOG", "Connection", "Crowd", "most_connections"]

READ = 20.0  # seconds from the first wait for a request to its last byte
WRITE = 60.0  # seconds to make an answer, and for the client to take it
LINGER = 1.0  # seconds in which a client that still sends can read why it is refused
MOST = 1000
BACKLOG = 64  # connections that are accepted at once, before the first of them is counted
_SPARE = 256  # open files for everything else


def most_connections() -> int:
    """How many connections there may be. The limit of open files is raised for them, as far as the system lets us."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MOST
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + _SPARE
    if soft < wanted and (hard == resource.RLIM_INFINITY or hard > soft):
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(MOST, max(soft - _SPARE, soft // 4)) if soft != resource.RLIM_INFINITY else MOST


class Crowd:
    """The connections of a server. Those that it waits for stand in the order in which they began to keep it waiting:
    first those of which no request was ever answered, then those that are kept open for the next one."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.inside: set[Connection] = set()
        self._new: dict[Connection, None] = {}
        self._known: dict[Connection, None] = {}

    def enter(self, connection: Connection) -> bool:
        """Whether there is a place. If need be, the connection that has been waited for longest makes room."""
        if len(self.inside) >= self.most:
            slowest = next(iter(self._new or self._known), None)
            if slowest is None:
                return False
            slowest.drop()
        self.inside.add(connection)
        return True

    def leave(self, connection: Connection) -> None:
        self.inside.discard(connection)
        self.work(connection)

    def wait_for(self, connection: Connection, known: bool) -> None:
        (self._known if known else self._new)[connection] = None

    def work(self, connection: Connection) -> None:
        """Its request is here: it cannot be pushed out any more."""
        self._new.pop(connection, None)
        self._known.pop(connection, None)


class Connection(H11Protocol):
    """uvicorn's, with deadlines and a place in the crowd."""

    def __init__(self, crowd: Crowd, **options: Any) -> None:
        super().__init__(**options)
        self.crowd = crowd
        self._timer: asyncio.TimerHandle | None = None
        self._working = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.crowd.enter(self):
            self._wait(READ)
        else:
            self.drop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        self.crowd.leave(self)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        unread = self.cycle.more_body
        self._working = False
        self._wait(WRITE)
        super().on_response_complete()
        if unread:  # what still comes is not read; closed at once, the client might never see the answer
            self.flow.pause_reading()
            self._limit(LINGER)
        else:
            self._look()  # the next request may have come with this one

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # garbage in the body of a request
            self.cycle.disconnected = True  # what the app still sends would come after the refusal
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.drop()

    def shutdown(self) -> None:
        """The server stops: a request that is not here yet is not waited for."""
        if self._working:
            super().shutdown()
        else:
            self.drop()

    def drop(self) -> None:
        self.crowd.leave(self)
        self.transport.abort()

    def _wait(self, seconds: float) -> None:
        self.crowd.wait_for(self, known=self.cycle is not None)
        self._limit(seconds)

    def _look(self) -> None:
        """Whether all of a request is here, and can be worked on."""
        if not self._working and self.cycle is not None and not (self.cycle.more_body or self.cycle.response_complete):
            self._working = True
            self.crowd.work(self)
            self._limit(WRITE)

    def _limit(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.drop)

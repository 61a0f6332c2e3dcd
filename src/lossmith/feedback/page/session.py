"""Who may come in: a link that works once, and the session that it is exchanged for."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Session", "Sessions"]

_MOST = 1000  # sessions in memory; the oldest goes first


@dataclass
class Session:
    """A browser that came in. `annotator` is set when it has said, or proved, who it is."""

    annotator: str | None = None
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    notice: str = ""  # to be shown once, on the next page


class Sessions:
    """Held in memory: when the server stops, every session ends. `announce` is called with every new token."""

    def __init__(self, announce: Callable[[str], None] | None = None) -> None:
        self._announce = announce
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self.token = secrets.token_urlsafe(32)

    def get(self, cookie: str | None) -> Session | None:
        return self._sessions.get(cookie or "")

    def open(self, annotator: str | None = None) -> tuple[str, Session]:
        """A new session and its cookie."""
        cookie, session = secrets.token_urlsafe(32), Session(annotator)
        with self._lock:
            while len(self._sessions) >= _MOST:
                strangers = (name for name, known in self._sessions.items() if known.annotator is None)
                del self._sessions[next(strangers, next(iter(self._sessions)))]
            self._sessions[cookie] = session
        return cookie, session

    def end(self, cookie: str | None) -> None:
        with self._lock:
            self._sessions.pop(cookie or "", None)

    def redeem(self, token: str) -> bool:
        """Whether the token is the one that counts. It is used up by this, and the next one is announced."""
        with self._lock:
            if not secrets.compare_digest(token.encode(), self.token.encode()):
                return False
            self.token = secrets.token_urlsafe(32)
        if self._announce is not None:
            self._announce(self.token)
        return True

"""Annotators' accounts, needed where others than the owner of the machine can reach the page."""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
import unicodedata

from lossmith.errors import FeedbackError
from lossmith.feedback.store import Store

__all__ = ["Throttle", "add_account", "clean_name", "matches"]

_COST = (1 << 14, 8, 1)  # n, r, p of scrypt: 16 MB and some 50 ms a guess
_SHORTEST = 10
LONGEST_NAME = 60


def add_account(store: Store, name: str, password: str) -> None:
    """A new annotator, or a new password of one. Kept as a salted scrypt hash.

    FeedbackError: a name that cannot be shown, a password under 10 characters.
    """
    name = clean_name(name)
    if len(password) < _SHORTEST:
        raise FeedbackError(f"the password of {name!r} is shorter than {_SHORTEST} characters: choose a longer one.")
    store.set_account(name, _secret(password))


def clean_name(name: str) -> str:
    """A name as it is kept: one spelling of each letter, single spaces. FeedbackError: empty, long, or unprintable."""
    name = " ".join(unicodedata.normalize("NFC", name).split())
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise FeedbackError(f"a name has 1 to {LONGEST_NAME} characters, all of them visible.")
    return name


def matches(password: str, secret: str | None) -> bool:
    """Whether the password belongs to the hash. Takes as long when there is no such account."""
    n, r, p, salt, wanted = (secret or _NOBODY).split("$")
    cost = int(n), int(r), int(p)
    found = _hash(password, base64.b64decode(salt), cost)
    return secrets.compare_digest(found, base64.b64decode(wanted)) and secret is not None


def _secret(password: str) -> str:
    salt = secrets.token_bytes(16)
    fields = [
        *map(str, _COST),
        base64.b64encode(salt).decode(),
        base64.b64encode(_hash(password, salt, _COST)).decode(),
    ]
    return "$".join(fields)


def _hash(password: str, salt: bytes, cost: tuple[int, int, int]) -> bytes:
    n, r, p = cost
    return hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=salt, n=n, r=r, p=p)


_NOBODY = "$".join([*map(str, _COST), base64.b64encode(bytes(16)).decode(), base64.b64encode(bytes(64)).decode()])


class Throttle:
    """At most `limit` failures a key within `window` seconds."""

    def __init__(self, limit: int = 5, window: float = 60.0) -> None:
        self.limit, self.window = limit, window
        self._failures: dict[str, list[float]] = {}

    def closed(self, *keys: str) -> bool:
        since = time.monotonic() - self.window
        self._failures = {key: recent for key, times in self._failures.items() if (recent := _after(since, times))}
        return any(len(self._failures.get(key, ())) >= self.limit for key in keys)

    def failed(self, *keys: str) -> None:
        for key in keys:
            self._failures.setdefault(key, []).append(time.monotonic())


def _after(since: float, times: list[float]) -> list[float]:
    return [at for at in times if at > since]

"""Annotators' accounts, needed where others than the owner of the machine can reach the page."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ipaddress
import secrets
import threading
import time
import unicodedata

from lossmith.errors import FeedbackError
from lossmith.feedback.store import Store

__all__ = ["Throttle", "add_account", "clean_name", "matches"]

_COST = (1 << 14, 8, 1)  # n, r, p of scrypt: 16 MB and some 50 ms a guess
_SHORTEST = 10
LONGEST_NAME = 60
_REMEMBERED = 10_000  # counts that are kept at most, before those that have refilled are forgotten


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
    try:
        return _fits(password, secret or _NOBODY) and secret is not None
    except (
        ValueError,
        TypeError,
        OverflowError,
    ):  # the file is damaged there: nobody comes in by it, and --add-account replaces it
        _fits(password, _NOBODY)
        return False


def _fits(password: str, secret: str) -> bool:
    n, r, p, salt, wanted = secret.split("$")
    digest = _hash(password, base64.b64decode(salt), (int(n), int(r), int(p)))
    return secrets.compare_digest(digest, base64.b64decode(wanted))


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
    """How often passwords may be tried: for an account from one address, from one address, and by all.

    A try is counted before the password is looked at, so that tries at the same time count as well, and given back if
    it was right. Each count refills over the window, so that nobody is kept out for longer than it takes to refill by
    one; and since addresses are counted apart, nobody can keep another one out by guessing at their account.
    """

    def __init__(self, account: int = 5, address: int = 30, everyone: int = 300, window: float = 60.0) -> None:
        """The most tries within `window` seconds."""
        self._most, self.window = (account, address, everyone), window
        self._used: dict[tuple[str, ...], tuple[float, float]] = {}  # key: (tries not yet refilled, when)
        self._lock = threading.Lock()

    def enter(self, address: str, account: str) -> float:
        """0.0: the try is counted. Otherwise it may not be made, and this is how many seconds to wait."""
        with self._lock:
            now = time.monotonic()
            if len(self._used) > _REMEMBERED:
                self._used = {k: v for k, v in self._used.items() if self._left(k, now) > 0}
            keys = _keys(address, account)
            wait = max(
                (self._left(key, now) + 1 - most) * self.window / most
                for key, most in zip(keys, self._most, strict=True)
            )
            if wait > 0:
                return wait
            for key in keys:
                self._used[key] = (self._left(key, now) + 1, now)
            return 0.0

    def right(self, address: str, account: str) -> None:
        """The try was right, and counts no more."""
        with self._lock:
            now = time.monotonic()
            for key in _keys(address, account):
                self._used[key] = (max(self._left(key, now) - 1, 0.0), now)

    def _left(self, key: tuple[str, ...], now: float) -> float:
        used, since = self._used.get(key, (0.0, now))
        return max(0.0, used - (now - since) * self._most[2 - len(key)] / self.window)


def _keys(address: str, account: str) -> tuple[tuple[str, ...], ...]:
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(address).version == 6:  # whoever has one address of version 6 has 2**64 of them
            address = str(ipaddress.ip_network(f"{address}/64", strict=False))
    return (address, account), (address,), ()

"""One POST to a server that may be busy: what is tried again, how long it is waited for, and how often it is asked.

The http scorer and the judge behind an endpoint both ask through here.
"""

from __future__ import annotations

import email.utils
import http.client
import itertools
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from typing import IO, Any
from urllib.parse import urlsplit

from lossmith.scorers.address import Address
from lossmith.scorers.deadline import DeadlinePassed, DeadlineThread

__all__ = ["BUSY", "NoAnswer", "Server", "TimedOut"]

BACKOFF_SECONDS = 0.25  # doubled at each try, where the server does not say how long to wait
TRIES = 6
TRIES_500 = 3  # a server's own mistake is rarely a matter of time
MINUTE = 60.0
MAX_REPLY_BYTES = 64 * 2**20
BUSY = {408, 425, 429, 502, 503, 504}  # statuses that pass


class NoAnswer(Exception):
    """Why there is no reply; `status` is None where not even a refusal came."""

    def __init__(self, why: str, status: int | None = None, after: float = 0.0) -> None:
        super().__init__(why)
        self.status = status
        self.after = after  # seconds that the server asks to wait


class TimedOut(Exception):
    """No reply in time."""


class Server:
    """An address, asked at most `parallel` times at once and `per_minute` times in any minute (0: no limit).

    wait: how to sleep, in seconds.
    """

    def __init__(
        self,
        address: Address,
        parallel: int = 1,
        per_minute: int = 0,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.address, self.per_minute, self.wait = address, per_minute, wait
        self._slots = threading.BoundedSemaphore(parallel)
        self._request_times: deque[float] = deque(maxlen=per_minute)  # when, the last `per_minute` of them
        self._lock = threading.Lock()

    def post(self, body: bytes, timeout: float, *, patient: bool = True) -> bytes:
        """The reply to a body of JSON, within `timeout` seconds of trying; waiting for our own limits is not counted.

        Tried again, at growing intervals or when the server says (Retry-After: seconds or a date): no connection, and
        the statuses 408, 425, 429, 502, 503, 504; 500 too, if `patient`. NoAnswer: anything else, or no time is left
        to wait for it. TimedOut: no reply came.
        """
        with self._slots:
            end = time.monotonic() + timeout
            for tries in itertools.count(1):
                end += self._pace()
                try:
                    return self._once(body, end - time.monotonic())
                except NoAnswer as refusal:
                    busy = refusal.status is None or refusal.status in BUSY
                    most = TRIES if busy else TRIES_500 if refusal.status == 500 and patient else 1
                    pause = refusal.after or BACKOFF_SECONDS * 2 ** (tries - 1)
                    if tries >= most and not (busy and refusal.after > 0):
                        raise
                    if time.monotonic() + pause >= end:
                        raise _too_long(refusal, timeout) from None
                    self.wait(pause)
        raise AssertionError("unreachable")

    def _pace(self) -> float:
        """Wait until one more request keeps to `per_minute`; returns the seconds waited."""
        if not self.per_minute:
            return 0.0
        with self._lock:
            now = time.monotonic()
            times = self._request_times
            start = max(now, times[0] + MINUTE) if len(times) == self.per_minute else now
            times.append(start)
        if start > now:
            self.wait(start - now)
        return start - now

    def _once(self, body: bytes, timeout: float) -> bytes:
        thread = DeadlineThread()  # a socket's own timeout is per read, and a server may drip
        try:
            return thread.run(lambda: self._send(body, timeout), timeout)
        except (DeadlinePassed, TimeoutError):
            raise TimedOut from None
        finally:
            thread.stop()

    def _send(self, body: bytes, timeout: float) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "lossmith"}
        request = urllib.request.Request(self.address.url, data=body, headers=headers, method="POST")
        for name, value in self.address.headers.items():  # a server that sends us elsewhere does not send the key along
            request.add_unredirected_header(name, value)
        try:
            with _OPENER.open(request, timeout=max(0.01, timeout)) as reply:
                data = reply.read(MAX_REPLY_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                raise TimeoutError from None
            raise NoAnswer(_without_address(reason)) from None
        if len(data) > MAX_REPLY_BYTES:
            raise NoAnswer(f"the reply is longer than {MAX_REPLY_BYTES >> 20} MiB", status=200)
        return data

    def _refusal(self, error: urllib.error.HTTPError) -> NoAnswer:
        """A status that is no success, with the beginning of what the server said."""
        try:
            details = error.read(200).decode(errors="replace").strip()
        except (OSError, http.client.HTTPException):
            details = ""
        if error.code in (301, 302, 303, 307, 308):
            details = f"it points to {error.headers.get('Location', 'nowhere')}: give that address"
        text = f"status {error.code} {error.reason}".rstrip() + (f": {details}" if details else "")
        return NoAnswer(self.address.hide(text), error.code, _seconds(error.headers.get("Retry-After")))


class _SameRequest(urllib.request.HTTPRedirectHandler):
    """Follows 307 and 308, which mean "the same request, there"; what urllib makes of the others is a GET."""

    def redirect_request(
        self, request: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if code not in (307, 308) or urlsplit(newurl).scheme not in ("http", "https"):
            return None
        again = urllib.request.Request(newurl, data=request.data, headers=dict(request.headers), method="POST")
        if _origin(newurl) == _origin(request.full_url):
            for name, value in request.unredirected_hdrs.items():
                if name == "Authorization":
                    again.add_unredirected_header(name, value)
        return again


_OPENER = urllib.request.build_opener(_SameRequest)


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2].lower()


def _seconds(after: str | None) -> float:
    """Retry-After, a number of seconds or an HTTP date, in seconds from now; 0 where it says nothing sensible."""
    if after is None:
        return 0.0
    try:
        return max(0.0, min(float(after), 1e9))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _too_long(refusal: NoAnswer, timeout: float) -> NoAnswer:
    """There is no time to try again."""
    wish = f" and asks to wait {refusal.after:.0f} s" if refusal.after else ""
    limit = f"{round(timeout, 2):g} s"
    return NoAnswer(f"{refusal}{wish}; no time is left to try again within the limit of {limit}", refusal.status)


def _without_address(reason: object) -> str:
    """What a library says about a failed connection, without the address, which may hold a key."""
    if isinstance(reason, OSError) and reason.strerror:
        return f"{type(reason).__name__}: {reason.strerror}"
    if isinstance(reason, http.client.HTTPException | ValueError):
        return f"no HTTP: {type(reason).__name__}"
    return type(reason).__name__

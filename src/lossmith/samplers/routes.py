"""One question to a sampling server over HTTP, and every way in which it can go unanswered, in one sentence each.

Routes only: vLLM's Python classes change from release to release, its routes do not.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from lossmith.errors import RunError, printable
from lossmith.scorers.deadline import DeadlinePassed, DeadlineThread

__all__ = ["Refused", "Routes"]

MAX_REPLY_BYTES = 256 * 2**20
TRIES = 3  # of a connection that was refused or broken: a server that is busy may drop one
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is for the web, not for our server


class Refused(RunError):
    """The server answered, and will not do it."""


class Routes:
    """The routes of one server. timeout: seconds that one answer may take.

    hint: what to do where it cannot be reached, as the end of the message.
    """

    def __init__(self, url: str, timeout: float, hint: str) -> None:
        self.url, self.timeout, self.hint = url.rstrip("/"), timeout, hint

    def ask(self, path: str, body: Any = None, *, optional: bool = False) -> Any:
        """The JSON of the answer: to a POST of `body`, or to a GET where there is none.

        optional: None where the server has no such route. Refused: it says no. RunError: no answer in time, or no JSON.
        """
        reply = self._reply(path, body, optional)
        if not reply:
            return None
        try:
            return json.loads(reply)
        except (ValueError, RecursionError):
            begins = printable(reply[:60].decode(errors="replace"))
            raise RunError(f"{self.url}{path} answered {begins!r}, which is not JSON. {self.hint}") from None

    def _reply(self, path: str, body: Any, optional: bool) -> bytes:
        end = time.monotonic() + self.timeout
        for tries in range(1, TRIES + 1):
            thread = DeadlineThread()  # a socket's own timeout is per read, and a server may drip
            try:
                return thread.run(lambda: self._once(path, body, end), end - time.monotonic())
            except (DeadlinePassed, TimeoutError):
                raise RunError(
                    f"{self.url}{path} gave no answer within {self.timeout:g} s. Look at the server, or raise "
                    f"sampler_timeout. {self.hint}"
                ) from None
            except urllib.error.HTTPError as error:
                if optional and error.code in (404, 405):
                    error.close()
                    return b""
                raise Refused(f"{self.url}{path} answered {_status(error)}. {self.hint}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if tries == TRIES or time.monotonic() + 1 > end:
                    reason = getattr(error, "reason", None) or error
                    raise RunError(f"{self.url} cannot be reached ({reason}). {self.hint}") from None
                time.sleep(0.25 * tries)
            finally:
                thread.stop()
        raise AssertionError("unreachable")

    def _once(self, path: str, body: Any, end: float) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        try:
            with _OPENER.open(request, timeout=max(0.01, end - time.monotonic())) as reply:
                answer: bytes = reply.read(MAX_REPLY_BYTES + 1)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise TimeoutError from None
            raise
        if len(answer) > MAX_REPLY_BYTES:
            raise ValueError(f"its answer is longer than {MAX_REPLY_BYTES >> 20} MiB")
        return answer


def _status(error: urllib.error.HTTPError) -> str:
    with error:
        try:
            details = printable(error.read(300).decode(errors="replace").strip())
        except (OSError, http.client.HTTPException):
            details = ""
    return f"status {error.code}" + (f": {details}" if details else "")

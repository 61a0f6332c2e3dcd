"""A scorer behind an address: one POST of JSON a batch.

Sent:     {"prompts": [...], "completions": [...], "columns": {"name": [...]}}, in the shapes of `callable.py`.
Expected: {"scores": [0.5, "abstain", ...]}, one number or "abstain" per completion; null is an error, never a 0.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from lossmith.errors import ScorerError
from lossmith.rewards.callable import as_batch
from lossmith.rewards.deadline import DeadlinePassed, DeadlineThread
from lossmith.rewards.function import judge_all
from lossmith.rollouts import Rollout, Score

__all__ = ["HttpScorer"]

RETRIES = 2
BACKOFF_SECONDS = 0.25  # doubled at each retry
MAX_REPLY_BYTES = 64 * 2**20


class HttpScorer:
    """Asks a server for scores. `timeout` is in seconds for one batch, retries included.

    Connection errors and answers of 500 and above are tried at most twice more; everything else is final.
    Raises ScorerError here for an address that is not http:// or https://.
    """

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ScorerError(f"{url!r} is not an address; write http://host:port/path or https://host/path.")
        self.url = url
        self.name = parts.netloc.rpartition("@")[2] + parts.path  # a password in the address stays out of reports
        self.timeout = timeout
        self.waits = True  # on another machine, say: scoring a group need not wait for the next to be written
        self._thread = DeadlineThread()

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self.score_within(rollouts, None)

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        limit = self.timeout if timeout is None else min(self.timeout, timeout)
        batch = as_batch(rollouts)
        asked = {key: value for key, value in batch.items() if key != "completion_ids"}
        body = json.dumps(asked, default=str).encode()  # dates and the like go as text
        try:  # in a thread: a socket's own timeout is per read, and a server may drip
            reply = self._thread.run(lambda: _post(self.url, body, time.monotonic() + limit), limit)
            verdicts = judge_all(_scores(reply), len(rollouts))
        except (DeadlinePassed, TimeoutError):
            verdicts = [{"error": f"timeout: no answer from {self.name} within {limit:g} s"}] * len(rollouts)
        except _Refusal as refusal:
            verdicts = [{"error": f"http: {refusal}"}] * len(rollouts)
        return [Score(**verdict) for verdict in verdicts]

    def close(self) -> None:
        """End the thread once it is idle."""
        self._thread.stop()


class _Refusal(Exception):
    """Why there are no scores."""


def _post(url: str, body: bytes, end: float) -> bytes:
    """The reply's body. Retries while there is time before `end` (monotonic seconds); _Refusal when that is no use."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"}, method="POST")
    for attempt in range(RETRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=max(0.01, end - time.monotonic())) as reply:
                return reply.read(MAX_REPLY_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(200).decode(errors="replace").strip()
            refusal = _Refusal(f"status {error.code} {error.reason}: {said}")
            if error.code < 500:
                raise refusal from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                raise TimeoutError from None
            refusal = _Refusal(f"{type(reason).__name__}: {reason}")
        pause = BACKOFF_SECONDS * 2**attempt
        if attempt == RETRIES or time.monotonic() + pause >= end:
            raise refusal
        time.sleep(pause)
    raise AssertionError("unreachable")


def _scores(reply: bytes) -> Any:
    if len(reply) > MAX_REPLY_BYTES:
        raise _Refusal(f"the reply is longer than {MAX_REPLY_BYTES >> 20} MiB")
    try:
        answer = json.loads(reply)
    except ValueError as error:
        raise _Refusal(f"the reply is not JSON ({error}): {reply[:60]!r}") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
        raise _Refusal(f'the reply has no list "scores": {reply[:60]!r}')
    return answer["scores"]

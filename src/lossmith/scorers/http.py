"""A scorer behind an address: POSTs of JSON. docs/scorers.md describes request, reply, statuses and limits.

Sent:     {"prompts": [...], "completions": [...], "columns": {"name": [...]}}, in the shapes of `callable.py`.
Expected: {"scores": [0.5, "abstain", {"error": "..."}, ...]}, one entry per completion; null is an error, never a 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lossmith.prompts import plain
from lossmith.rollouts import Rollout, Score
from lossmith.scorers.address import KEY, Address
from lossmith.scorers.callable import as_batch
from lossmith.scorers.function import CallFailure, ScorerBatch, Verdict, judge_all
from lossmith.scorers.parts import cut, in_parts
from lossmith.scorers.settings import ScorerSettings
from lossmith.scorers.web import NoAnswer, Server, TimedOut

__all__ = ["HttpScorer"]

OF_THE_BATCH = {400, 413, 422, 500}  # statuses that one completion, or too many of them, can cause


class HttpScorer:
    """Asks a server for scores.

    `timeout` is in seconds for one call with its retries, where `score_within` is given no other. A call that the
    server refuses (400, 413, 422, 500) is made again for each half, down to the completion at fault.

    Raises ScorerError here for an address that is not http:// or https://, or lacks the key that it names.
    """

    def __init__(self, url: str, timeout: float = 60.0, settings: ScorerSettings | None = None) -> None:
        self.settings = settings or ScorerSettings()
        address = Address.of(url)
        self.name = address.name  # a key in the address stays out of reports
        self.timeout = timeout
        self.waits = True  # on another machine, say: scoring a group need not wait for the next to be written
        self._hide = address.hide
        self._server = Server(address, self.settings.parallel, self.settings.per_minute)

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self.score_within(rollouts, None)

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        limit = self.timeout if timeout is None else timeout
        parts = cut(as_batch(rollouts), self.settings.batch or len(rollouts))
        if len(parts) == 1:
            verdict_lists = [in_parts(self._call, parts[0], limit)]
        else:
            pool = ThreadPoolExecutor(self.settings.parallel)
            try:
                verdict_lists = list(pool.map(lambda part: in_parts(self._call, part, limit), parts))
            finally:  # Ctrl-C does not wait for what is under way
                pool.shutdown(wait=False, cancel_futures=True)
        return [Score(**verdict) for verdicts in verdict_lists for verdict in verdicts]

    def _call(self, batch: ScorerBatch, timeout: float | None, whole: bool) -> list[Verdict]:
        limit = self.timeout if timeout is None else timeout
        request = {key: batch[key] for key in ("prompts", "completions", "columns")}
        body = json.dumps(plain(request)).encode()
        try:
            return self._verdicts(self._server.post(body, limit, patient=whole), len(batch["completions"]))
        except TimedOut:
            raise CallFailure(f"timeout: no answer from {self.name} within {round(limit, 2):g} s") from None
        except NoAnswer as refusal:
            key = f" Its key goes into {KEY}." if refusal.status in (401, 403) else ""
            raise CallFailure(f"http: {refusal} [{self.name}]{key}", refusal.status in OF_THE_BATCH) from None

    def _verdicts(self, reply: bytes, count: int) -> list[Verdict]:
        """CallFailure: the reply is not of the agreed shape."""
        begins = repr(self._hide(reply[:60].decode(errors="replace")))
        try:
            answer = json.loads(reply)
        except (ValueError, RecursionError):
            raise CallFailure(f"http: the reply is not JSON: {begins}") from None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise CallFailure(f'http: the reply has no list "scores": {begins}')
        verdicts = judge_all(scores, count)
        if len(scores) != count:  # said by every verdict
            return verdicts
        return [self._entry(entry, verdict) for entry, verdict in zip(scores, verdicts, strict=True)]

    def _entry(self, entry: Any, verdict: Verdict) -> Verdict:
        """null is what a failed score looks like in JSON (NaN among others); only "abstain" is an abstention."""
        if entry is None:
            return {"error": 'none: the server sent null; for "no opinion" it sends "abstain"'}
        if isinstance(entry, Mapping) and isinstance(entry.get("error"), str):
            return {"error": f"http: the server says {self._hide(entry['error'][:300])!r}"}
        return verdict

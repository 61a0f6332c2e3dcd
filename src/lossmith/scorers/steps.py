"""Rewards of segments and steps: what each part of a completion is worth, not only its end.

A completion is cut into segments; a scorer judges it up to the end of each; and r_k is put at the last token of segment
k, so that a loss reads rewards [N, T]. Equation numbers follow NLPBook ch. 10.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence, Set
from typing import Any

from lossmith.errors import ScorerError, nearest
from lossmith.rollouts import Rollout, Score
from lossmith.scorers.scorer import Scorer, ask, close_scorer, columns_read

__all__ = ["StepReward", "segment_ends"]

GAINS = ("difference", "correct", "log")
_ENDS = {"sentence": re.compile(r"[.!?]+[\"')\]]*(?=\s|$)"), "line": re.compile(r"\n+|$")}


class StepReward:
    """A scorer of whole texts, asked about each prefix of a completion.

    segments: "sentence", "line", or a number of tokens.
    gain: what a segment earns of s_k, the score of the text up to its end:
      `difference`  r_k = s_k - s_(k-1), s_0 = 0: they add up to the score of the whole (4.68, 4.69)
      `correct`     r_k = 1 where s_k > 0.5, a step judged correct (4.83)
      `log`         r_k = log s_k, s_k a probability of being correct (4.84)

    `Score.value` is Σ_k r_k; `Score.per_token` [T] has r_k at the last token of segment k and 0 elsewhere. Where a
    prefix has no score, neither has the completion.
    """

    def __init__(
        self,
        scorer: Scorer,
        segments: str | int = "sentence",
        gain: str = "difference",
        decode: Callable[..., str] | None = None,
    ) -> None:
        known = isinstance(segments, str) and segments in _ENDS
        if not known and not (isinstance(segments, int) and segments > 0):
            raise ScorerError(f"segments is {segments!r}.{nearest(str(segments), [*_ENDS, 'a number of tokens'])}")
        if gain not in GAINS:
            raise ScorerError(f"gain is {gain!r}.{nearest(gain, GAINS)}")
        self.scorer, self.segments, self.gain, self.decode = scorer, segments, gain, decode
        self._bound = False  # to a policy, which decodes a completion as the continuation of its prompt
        self.name = f"{gain} of {scorer.name} by {segments if isinstance(segments, str) else f'{segments} tokens'}"

    def bind(self, policy: Any) -> None:
        """Take the policy's tokenizer: only it knows which tokens a piece of text is."""
        self.decode, self._bound = policy.decode, True

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self.score_within(rollouts, None)

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        decode = self.decode
        if decode is None:
            raise ScorerError(
                f"{self.name} cuts token ids into text: give it decode=policy.decode, or call bind(policy)."
            )
        readers = [functools.partial(decode, after=r.prompt_ids) if self._bound else decode for r in rollouts]
        ends = [segment_ends(r.completion_ids, self.segments, read) for r, read in zip(rollouts, readers, strict=True)]
        prefixes = [
            dataclasses.replace(
                r, completion_ids=r.completion_ids[:end], completion=read(r.completion_ids[:end]),
                finish_reason=r.finish_reason if end == len(r.completion_ids) else "length",
            )
            for r, own_ends, read in zip(rollouts, ends, readers, strict=True) for end in own_ends
        ]  # fmt: skip
        answers = iter(ask(self.scorer, prefixes, timeout))
        return [
            self._combine(len(r.completion_ids), own_ends, [next(answers) for _ in own_ends])
            for r, own_ends in zip(rollouts, ends, strict=True)
        ]

    def columns_read(self, names: Set[str]) -> set[str]:
        """What the scorer of the texts is given."""
        return columns_read(self.scorer, names)

    def close(self) -> None:
        close_scorer(self.scorer)

    def _combine(self, length: int, ends: Sequence[int], scores: Sequence[Score]) -> Score:
        values = [s.value for s in scores if s.value is not None]
        if len(values) < len(scores):
            return next(s for s in scores if s.value is None)
        if self.gain == "difference":
            gains = [now - before for before, now in zip([0.0, *values], values, strict=False)]
        elif self.gain == "correct":
            gains = [float(value > 0.5) for value in values]
        elif all(0 < value <= 1 for value in values):
            gains = [math.log(value) for value in values]
        else:
            return Score(error=f"not a probability: {min(values, key=lambda v: 0 < v <= 1)}, and log needs (0, 1]")
        row = [0.0] * length
        for end, gain in zip(ends, gains, strict=True):
            row[end - 1] = gain
        return Score(value=math.fsum(gains), parts={"steps": float(len(gains))}, per_token=tuple(row))


def segment_ends(ids: Sequence[int], segments: str | int, decode: Callable[[Sequence[int]], str]) -> list[int]:
    """How many tokens there are up to the end of each segment, the last one being all of them."""
    if isinstance(segments, int):
        return [*range(segments, len(ids), segments), len(ids)]
    text = decode(ids)
    lengths = [len(decode(ids[: k + 1])) for k in range(len(ids))]
    marks = [m.end() for m in _ENDS[segments].finditer(text)]
    if marks and not text[marks[-1] :].strip():
        marks.pop()  # an end token or white space after the last sentence is no step of its own
    ends = {next((k + 1 for k, n in enumerate(lengths) if n >= mark), len(ids)) for mark in marks}
    return sorted(ends | {len(ids)})

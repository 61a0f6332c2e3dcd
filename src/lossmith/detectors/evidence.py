"""What detectors look at: the numbers of each step, an example of what they count, and what is known of the run.

It is made of a run under way, of a run folder, or of anybody's recorded completions; whatever is not known is left out,
and a detector that would need it says so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lossmith.errors import printable
from lossmith.rollouts import Rollout

__all__ = ["Completion", "Evidence", "Place", "StepSeen"]

SHOWN = 160  # characters of a text in a finding


@dataclass(frozen=True)
class Place:
    """Where something was seen: step as files count (from 0), prompt and completion in an excerpt."""

    step: int
    prompt: str = ""
    sample: int | None = None
    completion: str = ""
    said: str = ""  # what is to be said of it: its score, say, or its error

    @classmethod
    def of(cls, step: int, completion: Completion, said: str = "") -> Place:
        return cls(step, excerpt(completion.prompt_text), completion.sample, excerpt(completion.text or ""), said)


def excerpt(text: str) -> str:
    """The beginning of a text, on one line."""
    line = printable(" ".join(text[: 4 * SHOWN].split()))  # of a text of any length, no more than is shown
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


@dataclass(frozen=True)
class Completion:
    """One completion as anybody recorded it; None is what is not known."""

    prompt: str  # what tells its prompt from others
    prompt_text: str = ""
    sample: int | None = None
    text: str | None = None
    ids: Sequence[int] | None = None
    truncated: bool | None = None
    score: float | None = None
    error: str | None = None  # of its scorer
    advantage: float | None = None  # mean over its tokens
    behavior_logp: Sequence[float] | None = None  # [T] nats, of the sampler
    old_logp: Sequence[float] | None = None  # [T] nats, of the learner before its update

    @classmethod
    def of(cls, rollout: Rollout) -> Completion:
        score = rollout.score
        return cls(
            rollout.prompt.id, rollout.prompt.text, rollout.sample, rollout.completion, rollout.completion_ids,
            rollout.truncated, None if score is None else score.value, None if score is None else score.error,
            rollout.advantage, rollout.behavior_logp.values.tolist(),
        )  # fmt: skip

    @property
    def length(self) -> int | None:
        """Tokens, where they are known."""
        known = next((x for x in (self.ids, self.behavior_logp, self.old_logp) if x is not None), None)
        return None if known is None else len(known)


@dataclass(frozen=True)
class StepSeen:
    """One step: its numbers by the names of docs/metrics.md, and an example or two of what some of them count."""

    index: int
    numbers: Mapping[str, float]
    places: Mapping[str, Sequence[Place]] = field(default_factory=dict)

    @functools.cached_property
    def finite(self) -> dict[str, float]:
        """Those of its numbers that are some."""
        return {name: value for name, value in self.numbers.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Evidence:
    """The steps of a run in their order, and what is known of it as a whole.

    settings: those of its recipe. cut: what its loss does with completions that the token budget cut, if nothing can
    be learned from them ("leaves those out"). dtype: what the policy computes in ("bfloat16"). vocabulary: how many
    tokens there are. reward_scale: mean and standard deviation of a reward model's scores of its training texts.
    rescored: what the scorer says at the end of the texts that it scored at the beginning, as summary.json has it.
    """

    steps: Sequence[StepSeen]
    settings: Mapping[str, Any] = field(default_factory=dict)
    cut: str = ""
    dtype: str = ""
    vocabulary: int | None = None
    reward_scale: tuple[float, float] | None = None
    rescored: Mapping[str, Any] | None = None

    def has(self, *names: str) -> bool:
        """Whether any step recorded one of these as a finite number."""
        return any(name in step.finite for step in self.steps for name in names)

    def series(self, *names: str) -> list[tuple[int, float]]:
        """(step, the first of these that it recorded, as a finite number), of the steps that did."""
        found = []
        for step in self.steps:
            value = next((step.finite[name] for name in names if name in step.finite), None)
            if value is not None:
                found.append((step.index, float(value)))
        return found

    def places(self, name: str, steps: Sequence[int] | None = None, most: int = 3) -> tuple[Place, ...]:
        """Examples of what a number counts, the newest first; of these steps alone, where any are given."""
        wanted = None if steps is None else set(steps)
        found: list[Place] = []
        for step in reversed(self.steps):
            if wanted is None or step.index in wanted:
                found += step.places.get(name, ())
            if len(found) >= most:
                break
        return tuple(found[:most])

    def setting(self, name: str) -> Any:
        return self.settings.get(name)

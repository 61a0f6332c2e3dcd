"""What a detector is, and what it finds: a sentence, the number, what that rests on, where, why, and what to try."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lossmith.detectors.evidence import Evidence, Place

__all__ = ["LEVELS", "Detector", "Finding", "Level", "NotChecked", "Sign", "at_least"]

Level = Literal["note", "warn", "stop"]
LEVELS: tuple[Level, ...] = ("note", "warn", "stop")  # the worse the later


def at_least(level: str, least: str) -> bool:
    """Whether a level is `least` or worse."""
    order: Sequence[str] = LEVELS
    return order.index(level) >= order.index(least)


@dataclass(frozen=True)
class Sign:
    """What a detector saw.

    sentence: without its full stop, for whoever reads no code. value: the number that it is about, and n what that was
    taken over. steps: those in which it shows, as files count them (from 0). cause, cure: where they are known better
    than the detector's own.
    """

    level: Level
    sentence: str
    value: float
    n: int
    of: str  # what n counts
    steps: tuple[int, ...]
    places: tuple[Place, ...] = ()
    cause: str = ""
    cure: str = ""


@dataclass(frozen=True)
class NotChecked:
    """Why a detector says nothing: what it reads is not there. This is never "passed"."""

    reason: str


@dataclass(frozen=True)
class Detector:
    """One illness of a run, and how it is told from health.

    reads: what must have been recorded; of names joined by | one is enough. least: steps below which it says nothing.
    rule: the thresholds in words. voids: the level from which on held-out scores before and after say nothing of
    what was learned, so that the run ends without a verdict. asked_by: the setting that asks for the stop.
    """

    name: str
    illness: str
    rule: str
    reads: tuple[str, ...]
    look: Callable[[Evidence], Sign | NotChecked | None]
    cause: str
    cure: str
    source: str = ""
    least: int = 1
    voids: Level | None = None
    asked_by: str = ""

    def __call__(self, evidence: Evidence) -> Finding | NotChecked | None:
        """What is found; None where nothing is wrong."""
        missing = [names for names in self.reads if not evidence.has(*names.split("|"))]
        if missing:
            told = " and ".join(names.replace("|", " or ") for names in missing)
            return NotChecked(f"{told} {'is' if len(missing) == 1 else 'are'} not recorded")
        if len(evidence.steps) < self.least:
            return NotChecked(f"it needs {self.least} steps, and there are {len(evidence.steps)}")
        seen = self.look(evidence)
        return Finding.of_sign(self, seen) if isinstance(seen, Sign) else seen


@dataclass(frozen=True)
class Finding:
    """A sign with what is known of its illness: what somebody is told."""

    detector: str
    level: Level
    sentence: str
    value: float
    n: int
    of: str
    steps: tuple[int, ...]
    places: tuple[Place, ...]
    cause: str
    cure: str
    source: str
    voids: bool

    @classmethod
    def of_sign(cls, detector: Detector, sign: Sign) -> Finding:
        voids = detector.voids is not None and at_least(sign.level, detector.voids)
        return cls(
            detector.name, sign.level, sign.sentence, sign.value, sign.n, sign.of, sign.steps, sign.places,
            sign.cause or detector.cause, sign.cure or detector.cure, detector.source, voids,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Steps are counted from 0, as in the names of the files."""
        found = asdict(self)
        found["value"] = self.value if abs(self.value) < float("inf") else str(self.value)
        first, last = (self.steps[0], self.steps[-1]) if self.steps else (None, None)
        return found | {"steps": {"first": first, "last": last, "count": len(self.steps)}}

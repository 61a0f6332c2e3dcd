"""Where the time of a run went."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from lossmith.report.page.folder import RunSeen

__all__ = ["Phase", "phases"]


@dataclass(frozen=True)
class Phase:
    """seconds: mean of a step. share: of the step. inside: whether it is a part of the update above it."""

    name: str
    seconds: float
    share: float
    inside: bool


def phases(run: RunSeen) -> list[Phase]:
    """The parts of a step, and below "update" its own; none where the run measured none."""
    keys = dict.fromkeys(key for record in run.metrics for key in record if key.startswith("seconds_"))
    means = {
        key.removeprefix("seconds_"): statistics.fmean(value for _, value in series)
        for key in keys
        if (series := run.series(key))
    }
    parts = {name: x for name, x in means.items() if not name.startswith("update_")}
    inside = {name: x for name, x in means.items() if name.startswith("update_")}
    total = sum(parts.values())
    found = []
    for name, seconds in parts.items():
        found.append(Phase(name, seconds, seconds / total if total else 0.0, False))
        if name == "update":
            found += [Phase(k[7:].replace("_", " "), x, x / total if total else 0.0, True) for k, x in inside.items()]
    return found

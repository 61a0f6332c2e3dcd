"""Runs beside each other: those of one recipe with several seeds, and what differs between recipes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lossmith.report.page.folder import RunSeen, number

__all__ = ["Family", "differences", "families"]

# A run is the same whatever these say, but for the seed's chance.
_NO_RECIPE = {"seed", "name", "runs", "checkpoint_every", "checkpoint_minutes", "save_rollouts", "track"}


@dataclass(frozen=True)
class Family:
    """Runs of one recipe that differ in their seed."""

    runs: tuple[RunSeen, ...]
    index: int

    @property
    def label(self) -> str:
        if len(self.runs) == 1:
            return self.runs[0].name
        names = [run.name for run in self.runs]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return f"{len(names)} seeds: {', '.join(names[:4])}{more}"

    def band(self, key: str) -> list[tuple[int, float, float, float]]:
        """(step, mean, least, greatest) over the seeds, for the steps that all of them have."""
        series = [dict(run.series(key)) for run in self.runs]
        common = sorted(set.intersection(*map(set, series)))
        values = [(step, [s[step] for s in series]) for step in common]
        return [(step, statistics.fmean(v), min(v), max(v)) for step, v in values]

    def changes(self) -> Iterator[tuple[str, int, float, float, float, int]]:
        """(what, seeds, mean, least and greatest difference, prompts of each) over its finished runs."""
        found: dict[str, list[Any]] = {}
        for change in (c for run in self.runs for c in run.changes):
            found.setdefault(change.what, []).append(change.difference)
        for what, rows in found.items():
            means = [m for m in (number(row["mean"]) for row in rows) if m is not None]
            if len(means) > 1:
                yield what, len(means), statistics.fmean(means), min(means), max(means), rows[0]["n"]


def families(runs: Sequence[RunSeen]) -> list[Family]:
    """The runs by recipe, in the order in which they were given; a run without a recipe stands alone."""
    found: dict[str, list[RunSeen]] = {}
    for run in runs:
        rest = {k: v for k, v in run.recipe.items() if k not in _NO_RECIPE}
        found.setdefault(json.dumps(rest, sort_keys=True, default=str) if rest else str(run.path), []).append(run)
    return [Family(tuple(members), i) for i, members in enumerate(found.values())]


def differences(runs: Sequence[RunSeen]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of the settings that are not the same in all."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    keys = [k for k in dict.fromkeys(k for one in flat for k in one) if k not in ("name", "runs")]
    return [(k, [one.get(k, "–") for one in flat]) for k in keys if len({one.get(k, "–") for one in flat}) > 1]


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value, default=str)

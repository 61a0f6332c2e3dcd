"""A run as its folder tells it: finished, dead or still under way, learned from rollouts or from preferences."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lossmith.detectors import LEVELS, Finding
from lossmith.errors import RunError
from lossmith.files import at_home, read_text
from lossmith.intervals import verdict
from lossmith.losses import Loss
from lossmith.report.run.code import loss_without_code
from lossmith.report.run.doctor import doctor, read_json, read_toml
from lossmith.rollouts import Rollout, read_rollouts
from lossmith.training.evaluate import sentences
from lossmith.training.offline.preference_scores import verdict as preference_verdict
from lossmith.training.run import FINDINGS, read_metrics

__all__ = ["Change", "RunSeen", "number", "read_runs", "short"]


@dataclass(frozen=True)
class Change:
    """A held-out figure before and after, as summary.json holds it: each a mean with its interval and n."""

    what: str
    unit: str  # what n counts
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    difference: Mapping[str, Any]
    preferred: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RunSeen:
    """What there is of a run. name: tells it from the others on the page."""

    path: Path
    name: str
    recipe: dict[str, Any]
    recipe_text: str
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    findings: list[dict[str, Any]]  # the worst of each detector, the worst first
    notes: list[str]  # what could not be read

    @property
    def prefers(self) -> bool:
        """Whether it learned from preferences, so that there are no rollouts."""
        return "preferences" in self.recipe

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def steps_wanted(self) -> int | None:
        wanted = self.recipe.get("steps")
        return wanted if isinstance(wanted, int) else None

    @property
    def state(self) -> str:
        """Whether it came to its end, in words."""
        done = len(self.metrics)
        of = f" of {self.steps_wanted}" if self.steps_wanted and self.steps_wanted != done else ""
        if self.finished:
            stopped = self.summary.get("stopped")
            return (
                f"stopped early after {done}{of} steps: {stopped}"
                if stopped
                else f"finished, {done} step{'s' * (done != 1)}"
            )
        written = self.path / "metrics.jsonl"
        when = f"; last written {_time(written)}" if written.exists() else ""
        return f"not finished: {done}{of} steps are recorded (it stopped, or is still under way{when})"

    @cached_property
    def changes(self) -> list[Change]:
        """Before and after on what was held out; none where the run has not come to its end."""
        if not self.summary:
            return []
        held_out = self.summary["held_out"]
        if self.prefers:
            parts = (held_out[when]["accuracy"] for when in ("before", "after", "difference"))
            return [Change("held-out preference accuracy", "prompts", *parts)]
        found = [_change("held-out score", held_out)]
        return found + ([_change("watched score", self.summary["watch"])] if "watch" in self.summary else [])

    @cached_property
    def verdicts(self) -> list[str]:
        """The sentences that the run itself ended with."""
        if not self.summary:
            return []
        if self.prefers:
            return preference_verdict(self.summary)
        watched = [verdict(c.difference, c.what) for c in self.changes[1:]]
        return sentences(self.summary) + watched

    @cached_property
    def loss(self) -> Loss | None:
        """None where reading it would run somebody's code."""
        loss = loss_without_code(self.recipe.get("loss"))
        if loss is not None and "max_length" in loss.needs and isinstance(self.recipe.get("max_tokens"), int):
            return loss.replace(max_length=self.recipe["max_tokens"])
        return loss

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step as people count it, value) of the steps in which it was measured."""
        other = "sampled_entropy" if key == "entropy" else key  # that of runs before there was the alias
        found = ((r["step"], number(r.get(key, r.get(other)))) for r in self.metrics)
        series = [(step + 1, value) for step, value in found if value is not None]
        if key == "held_out" and series and self.changes:  # measured before a step's update: the last one is at the end
            last = number(self.changes[0].after["mean"])
            series += [] if last is None else [(len(self.metrics) + 1, last)]
        return series

    def held_out(self, when: str) -> list[Rollout]:
        """The held-out completions "before" or "after"; none where they were not written."""
        file = self.path / "rollouts" / f"held-out-{when}.parquet"
        return self.read(file) if file.exists() else []

    @cached_property
    def step_files(self) -> dict[int, Path]:
        """{step as files count it: its rollouts}"""
        files = sorted((self.path / "rollouts").glob("step-*.parquet"))
        return {int(f.stem[5:]): f for f in files if f.stem[5:].isdecimal()}

    def read(self, file: Path) -> list[Rollout]:
        """Its rollouts; a file that is damaged is a note."""
        try:
            return read_rollouts(file)
        except RunError as error:
            self.notes.append(str(error))
            return []


def read_runs(paths: Sequence[str | Path]) -> list[RunSeen]:
    """The runs, each under a name that is its own. RunError: none is given, one twice, or one is no run folder."""
    if not paths:
        raise RunError("give one run folder or more: lossmith report runs/NAME -o report.html")
    places = [at_home(path) for path in paths]
    known: set[Path] = set()
    for place in places:
        if place.resolve() in known:
            raise RunError(f"the run {str(place)!r} is given twice.")
        known.add(place.resolve())
    names = [place.resolve().name for place in places]
    return [
        _read(place, name if names.count(name) == 1 else str(place)) for place, name in zip(places, names, strict=True)
    ]


def _read(place: Path, name: str) -> RunSeen:
    if not place.is_dir():
        raise RunError(f"there is no run folder {str(place)!r}.")
    if not (place / "recipe.toml").exists() and not (place / "metrics.jsonl").exists():
        raise RunError(f"{str(place)!r} is not a run folder: it holds neither recipe.toml nor metrics.jsonl.")
    notes: list[str] = []
    file = place / "recipe.toml"
    recipe = read_toml(file, notes)
    metrics = read_metrics(place / "metrics.jsonl") if (place / "metrics.jsonl").exists() else []
    if any(not isinstance(r["step"], int) for r in metrics):
        raise RunError(f"{place / 'metrics.jsonl'}: a step is a whole number, and in one line it is not.")
    seen = RunSeen(
        place,
        name,
        recipe,
        read_text(file, RunError, "recipe file") if recipe else "",
        metrics,
        read_json(place / "summary.json", notes),
        _findings(place, notes),
        notes,
    )
    return seen if not seen.summary or _sound(seen) else _without_summary(seen)


def _sound(seen: RunSeen) -> bool:
    """Whether summary.json is one that such a run writes."""
    try:
        assert seen.verdicts
        return all(isinstance(x["n"], int) for c in seen.changes for x in (c.before, c.after, c.difference))
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _without_summary(seen: RunSeen) -> RunSeen:
    told = "summary.json is not as a run writes it, and was left out"
    return RunSeen(
        seen.path, seen.name, seen.recipe, seen.recipe_text, seen.metrics, {}, seen.findings, [*seen.notes, told]
    )


def _change(what: str, held_out: Mapping[str, Any]) -> Change:
    return Change(what, "prompts", *(held_out[k] for k in ("before", "after", "difference", "preferred")))


def _findings(place: Path, notes: list[str]) -> list[dict[str, Any]]:
    """What was said during the run, and what shows in it now: the worst of each detector."""
    said = _lines(place / FINDINGS, notes)
    try:
        diagnosis = doctor(place)
        said += [f.as_dict() for f in diagnosis.findings]
    except RunError:
        pass  # not one step: the page says so
    worst: dict[str, dict[str, Any]] = {}
    for finding in said:
        kept = worst.get(finding["detector"])
        if kept is None or LEVELS.index(finding["level"]) > LEVELS.index(kept["level"]):
            worst[finding["detector"]] = finding
    return sorted(worst.values(), key=lambda f: -LEVELS.index(f["level"]))


_KINDS: dict[str, Callable[[Any], bool]] = {
    "level": lambda x: x in LEVELS,
    "n": lambda x: isinstance(x, int),
    "steps": lambda x: isinstance(x, dict) and {"first", "last", "count"} <= x.keys(),
    "places": lambda x: isinstance(x, list),
}


def _lines(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Findings as the guards wrote them; a torn last line, and what is no finding, is left out and said."""
    found, torn = [], 0
    for line in read_text(file, RunError, "file").splitlines() if file.exists() else ():
        try:
            finding = json.loads(line)
            whole = all(_KINDS.get(x, lambda x: isinstance(x, object))(finding[x]) for x in Finding.__annotations__)
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if whole:
            found.append(finding)
        else:
            torn += 1
    if torn:
        notes.append(f"{file.name}: {torn} line{'s' * (torn > 1)} could not be read")
    return found


def number(x: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
        return None
    return float(x)


def short(spec: Any) -> str:
    """A scorer, a loss or a model of a recipe in a few words."""
    if isinstance(spec, Mapping):
        name = spec.get("name") or spec.get("function") or spec.get("completion")
        return str(name) if name else json.dumps(spec, ensure_ascii=False, default=str)
    return spec if isinstance(spec, str) else json.dumps(spec, ensure_ascii=False, default=str)


def _time(file: Path) -> str:
    return f"{datetime.datetime.fromtimestamp(file.stat().st_mtime):%Y-%m-%d %H:%M}"

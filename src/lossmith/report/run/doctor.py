"""What is wrong with a run, told from its folder: finished, dead, or still under way."""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lossmith.detectors import Completion, Diagnosis, Evidence, StepSeen, examine, measure
from lossmith.detectors.measuring import Numbers, Places
from lossmith.errors import RunError
from lossmith.files import at_home, read_text
from lossmith.replay import Recorded, read_recorded
from lossmith.report.run.code import loss_without_code
from lossmith.rollouts import read_rollouts
from lossmith.scorers.seal import scale_of
from lossmith.training.guards import left_out
from lossmith.training.metrics import in_completions
from lossmith.training.run import read_metrics

__all__ = ["doctor", "evidence_of", "read_json", "read_toml"]


def doctor(path: str | Path) -> Diagnosis:
    """Every detector over a run's folder, a metrics.jsonl, or recorded rollouts; print() it to read it.

    The run may be finished, dead or under way; the rollouts may be of any trainer that `replay` reads. Nothing of the
    run is executed. RunError: there is nothing that could be read.
    """
    evidence, notes = evidence_of(path)
    return replace(examine(evidence), subject=str(path), notes=tuple(notes))


def evidence_of(path: str | Path) -> tuple[Evidence, list[str]]:
    """(what detectors look at, what is to be known of it)."""
    place = at_home(path)
    if not place.exists():
        raise RunError(f"there is no run folder {str(path)!r}.")
    if place.is_file() and place.suffix == ".jsonl" and "metrics" in place.stem:
        return Evidence([StepSeen(int(r["step"]), _numbers(r)) for r in read_metrics(place)]), []
    if place.is_file() or not any((place / name).exists() for name in ("recipe.toml", "metrics.jsonl")):
        return _of_recorded(read_recorded(place))
    return _of_run(place)


def _of_run(place: Path) -> tuple[Evidence, list[str]]:
    notes: list[str] = []
    steps = _steps(place, notes)
    if not steps:
        damaged = f" ({'; '.join(notes)})" if notes else ""
        raise RunError(
            f"{str(place)!r} holds no step that could be looked at{damaged}: neither metrics.jsonl nor rollouts/ says "
            "anything of one. Give the folder of a run that has finished a step."
        )
    recipe = read_toml(place / "recipe.toml", notes)
    known = read_json(place / "inputs.json", notes).get("known", {})
    evidence = Evidence(
        steps,
        recipe,
        cut=_left_out(recipe.get("loss")),
        dtype=known.get("dtype", ""),
        vocabulary=known.get("vocabulary"),
        reward_scale=scale_of(recipe.get("scorer")),
        rescored=read_json(place / "summary.json", notes).get("rescored"),
    )
    return evidence, notes


def _of_recorded(recorded: Sequence[Recorded]) -> tuple[Evidence, list[str]]:
    """Of rollouts alone, whoever recorded them."""
    steps = [StepSeen(r.step, *measure(r.step, _completions(r))) for r in recorded]
    notes = [f"rollouts of {recorded[0].source}", *dict.fromkeys(note for r in recorded for note in r.notes)]
    return Evidence(steps), notes


def _completions(recorded: Recorded) -> list[Completion]:
    samples: Counter[str] = Counter()
    made = []
    for row in recorded.rows:
        prompt = str(row.prompt if row.group is None else row.group)
        reward, advantage = row.by_row.get("reward"), row.advantage
        if reward is None and "reward" in row.by_token:
            reward = math.fsum(row.by_token["reward"])
        if isinstance(advantage, list):
            advantage = statistics.fmean(advantage) if advantage else None
        made.append(
            Completion(
                prompt,
                row.prompt,
                samples[prompt],
                row.completion or None,
                row.tokens,
                row.by_row.get("truncated"),
                reward,
                advantage=advantage,
                behavior_logp=row.by_token.get("behavior_logp"),
                old_logp=row.by_token.get("old_logp"),
            )
        )
        samples[prompt] += 1
    return made


def _steps(folder: Path, notes: list[str]) -> list[StepSeen]:
    """What metrics.jsonl and rollouts/ hold of each step."""
    written = folder / "metrics.jsonl"
    numbers = {int(r["step"]): _numbers(r) for r in (read_metrics(written) if written.exists() else [])}
    measured: dict[int, tuple[Numbers, Places]] = {}
    for file in sorted((folder / "rollouts").glob("step-*.parquet")):
        try:
            step = int(file.stem.removeprefix("step-"))
            measured[step] = _measured(step, file)
        except (ValueError, RunError) as error:
            notes.append(str(error))
    return [
        StepSeen(step, found[0] | numbers.get(step, {}), found[1])
        for step in sorted({*numbers, *measured})
        for found in [measured.get(step, ({}, {}))]
    ]


def _measured(step: int, file: Path) -> tuple[Numbers, Places]:
    return measure(step, [Completion.of(rollout) for rollout in read_rollouts(file)])


def _numbers(record: Mapping[str, Any]) -> Numbers:
    kept = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return in_completions(kept)


def read_toml(file: Path, notes: list[str]) -> dict[str, Any]:
    """A recipe as it stands, which may be of another version; {} where there is none."""
    if not file.exists():
        return {}
    try:
        return tomllib.loads(read_text(file, RunError, "recipe file"))
    except (ValueError, RecursionError, RunError) as error:
        notes.append(f"{file.name}: {error}")
        return {}


def read_json(file: Path, notes: list[str]) -> dict[str, Any]:
    """An object of a JSON file; {} where there is none, and a note where it is damaged."""
    if not file.exists():
        return {}
    try:
        found = json.loads(read_text(file, RunError, "file"))
    except (ValueError, RecursionError, RunError) as error:
        notes.append(f"{file.name}: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def _left_out(spec: Any) -> str:
    """What the loss does with truncated completions. A loss of somebody's own code is not asked: that would run it."""
    loss = loss_without_code(spec)
    return "" if loss is None else left_out(loss)

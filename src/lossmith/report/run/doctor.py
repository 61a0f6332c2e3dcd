"""What is wrong with a run, told from its folder: finished, dead, or still under way."""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections import Counter
from collections.abc import Sequence
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

_COUNTS = {"epochs", "max_tokens", "prompts_per_step", "updates_per_step", "watch_window"}


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
        return Evidence([StepSeen(step, numbers) for step, numbers in sorted(_written(place).items())]), []
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
    known = read_json(place / "inputs.json", notes).get("known")
    known = known if isinstance(known, dict) else {}
    vocabulary = known.get("vocabulary")
    evidence = Evidence(
        steps,
        {key: value for key, value in recipe.items() if _is_number(value) and (key not in _COUNTS or _is_count(value))},
        cut=_left_out(recipe.get("loss")),
        dtype=str(known.get("dtype", "")),
        vocabulary=vocabulary if isinstance(vocabulary, int) and vocabulary > 1 else None,
        reward_scale=scale_of(recipe.get("scorer")),
        rescored=_rescored(read_json(place / "summary.json", notes).get("rescored")),
    )
    return evidence, notes


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 10**9


def _rescored(found: Any) -> dict[str, Any] | None:
    """What summary.json says of it, where that is whole."""
    if not isinstance(found, dict) or not isinstance(found.get("change"), dict):
        return None
    change = found["change"]
    figures = [found.get(key) for key in ("n", "changed", "mean_absolute", "spread")]
    bounds = [change.get(key) for key in ("ci95_low", "ci95_high")]
    optional = [found.get("claimed"), *bounds]
    whole = all(map(_is_number, figures)) and all(x is None or _is_number(x) for x in optional)
    whole = whole and bounds.count(None) != 1 and (_is_number(change.get("mean")) or not found["n"])
    return found if whole else None


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
    numbers = _written(written) if written.exists() else {}
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


def _written(file: Path) -> dict[int, Numbers]:
    """{step: its numbers} of a metrics.jsonl. RunError: a line is none of a step."""
    found: dict[int, Numbers] = {}
    for number, record in enumerate(read_metrics(file), 1):
        step = record["step"]
        if not isinstance(step, int) or isinstance(step, bool):
            raise RunError(f"{file}:{number}: the step is {step!r}, and a whole number is wanted.")
        found[step] = in_completions({k: float(v) for k, v in record.items() if _is_number(v) or _no_number(v)})
    return found


def _no_number(value: Any) -> bool:
    """NaN or infinity, which a detector looks for."""
    return isinstance(value, float) and not math.isfinite(value)


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

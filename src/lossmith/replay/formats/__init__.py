"""Recorded rollouts of Lossmith and other trainers, read into one record. Parquet and JSON lines; no pickles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet

from lossmith.errors import RunError
from lossmith.files import at_home
from lossmith.replay.formats import mapped, own, trl
from lossmith.replay.formats.jsonl import layout_of
from lossmith.replay.formats.lines import json_records, shown_keys
from lossmith.replay.recorded import Recorded, Row, recorded, without_doubles

__all__ = ["read_recorded"]

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin")


def read_recorded(path: str | Path, mapping: Mapping[str, str] | None = None) -> list[Recorded]:
    """The steps that a file, a folder of files, or a run's folder holds.

    mapping: {field: column} for a file that none of the known trainers wrote; a field of Batch, or prompt, completion,
    group, step, tokens, prompt_tokens, advantage.
    RunError: there is nothing to read, it is a pickle (reading one runs its code), or its columns are unknown.
    """
    place = at_home(path)
    files = _files(place)
    rows: list[Row] = []
    notes: list[str] = []
    sources: list[str] = []
    for file in files:
        source, found, said = _read(file, mapping)
        rows, notes = rows + found, notes + said
        sources.append(source)
    if len(set(sources)) > 1:
        raise RunError(f"{place} holds files of several trainers ({', '.join(sorted(set(sources)))}). Name one file.")
    if sources[0] == "TRL":
        rows, doubles = without_doubles(rows)
        if doubles:
            notes.append(
                f"{doubles} rows that repeat an earlier step's were left out: TRL logs a batch at every update"
            )
    return recorded(rows, sources[0], str(place), list(dict.fromkeys(notes)))


def _files(place: Path) -> list[Path]:
    """The files to read, in order."""
    if place.suffix in PICKLES:
        raise RunError(
            f"{place} is a pickle, and reading one runs the code in it. Write parquet or JSON lines instead."
        )
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise RunError(f"there is no file or folder {str(place)!r}.")
    inside = place / "rollouts" if (place / "rollouts").is_dir() else place
    for pattern in ("step-*.parquet", "completions_*.parquet", "*.jsonl", "step_*/*.jsonl", "*.parquet"):
        found = sorted(inside.glob(pattern))
        if found:
            return found
    raise RunError(
        f"{str(place)!r} holds no rollouts. A run writes them with save_rollouts = true (rollouts/step-*.parquet); TRL "
        "with log_completions=True; verl with trainer.rollout_data_dir."
    )


def _read(file: Path, mapping: Mapping[str, str] | None) -> tuple[str, list[Row], list[str]]:
    """(whose file it is, its rows, notes)."""
    if mapping:
        return "your mapping", mapped.rows(file, mapping), []
    if file.suffix == ".parquet":
        try:
            names = pyarrow.parquet.read_schema(file).names
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise RunError(f"{str(file)!r} cannot be read as a parquet file: {error}") from None
        if {"prompt_id", "tokens", "behavior_logp", "score"} <= set(names):
            return "Lossmith", own.rows(file), []
        if {"prompt", "completion", "advantage", "step"} <= set(names):
            return "TRL", *trl.rows(file)
        raise RunError(
            f"{file}: a parquet file with {shown_keys(names)} is of no trainer that is known. Say what its columns are "
            "with --map reward=...,completion=...,group=..."
        )
    records = json_records(file)
    if not records:
        raise RunError(f"{file} is empty.")
    layout = layout_of(records[0])
    for record in records:
        missing = [mark for mark in layout.marks if mark not in record]
        if missing:
            raise RunError(f"{record.where}: {missing[0]} is missing, which other lines of {layout.source} have.")
    return layout.source, [row for record in records for row in layout.rows(record)], list(layout.notes)

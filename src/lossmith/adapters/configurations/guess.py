"""Whose configuration it is, and its loss."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lossmith.adapters.configurations import nemo_rl, openrlhf, prime_rl, skyrl, trl, verl
from lossmith.adapters.configurations.reading import Reading, Settings, Trainer
from lossmith.adapters.configurations.source import Source, from_file, from_object
from lossmith.errors import LossError, nearest

__all__ = ["TRAINERS", "read"]

_ALL = (trl.TRAINER, verl.TRAINER, openrlhf.TRAINER, skyrl.TRAINER, prime_rl.TRAINER, nemo_rl.TRAINER)
TRAINERS: dict[str, Trainer] = {trainer.name: trainer for trainer in _ALL}


def read(configuration: Any, trainer: str | None = None) -> Reading:
    """The loss of a configuration: a path (str or Path), a mapping, or a trainer's own configuration object.

    trainer: whose it is, one of TRAINERS; by default it is recognized by settings that only one of them has.

    LossError: it cannot be read, no trainer or more than one is recognized, or it says something that the trainer
    itself would refuse. What is merely not understood is in `Reading.not_understood`.
    """
    if trainer is not None and trainer not in TRAINERS:
        raise LossError(f"trainer is {trainer!r}.{nearest(trainer, TRAINERS)}")
    named = isinstance(configuration, (str, os.PathLike))
    sources = from_file(Path(configuration)) if named else [from_object(configuration)]
    if trainer is not None:
        return _read(TRAINERS[trainer], _told(sources, TRAINERS[trainer]), "")
    found = [
        (owner, source, marks) for source in sources for owner in TRAINERS.values() if (marks := _marks(owner, source))
    ]
    if len(found) == 1:
        owner, source, marks = found[0]
        return _read(owner, source, f"recognized by {_some(marks)}")
    where = sources[0].where
    if not found:
        raise LossError(f"{where}: no setting in it is one of a known trainer alone; say whose it is: {_choices()}.")
    if len({owner.name for owner, _, _ in found}) > 1:
        said = "; ".join(f"{owner.title} has {_some(marks)}" for owner, _, marks in found)
        raise LossError(f"{where}: more than one trainer's settings: {said}. Say whose it is: {_choices()}.")
    raise _several(where, found[0][0], [source for _, source, _ in found])


def _choices() -> str:
    return " or ".join(f"trainer={name!r}" for name in TRAINERS)


def _marks(trainer: Trainer, source: Source) -> list[str]:
    marks = [name for name in trainer.settings(source).settings if trainer.own(name)]
    return [source.program, *marks] if any(p in source.program for p in trainer.programs) else marks


def _some(marks: Sequence[str]) -> str:
    return ", ".join(marks[:3]) + (f" and {len(marks) - 3} more" if len(marks) > 3 else "")


def _told(sources: Sequence[Source], trainer: Trainer) -> Source:
    """The command of a script that is this trainer's."""
    if len(sources) == 1:
        return sources[0]
    mine = [source for source in sources if _marks(trainer, source)]
    if len(mine) != 1:
        raise _several(sources[0].where, trainer, mine or sources)
    return mine[0]


def _several(where: str, trainer: Trainer, sources: Sequence[Source]) -> LossError:
    lines = " and ".join(str(min(source.lines.values())) for source in sources)
    return LossError(f"{where}: {trainer.title} is launched in lines {lines}: keep one of them in a file of its own.")


def _read(trainer: Trainer, source: Source, why: str) -> Reading:
    settings = Settings(trainer.settings(source), trainer)
    return settings.reading(trainer.loss(settings), why)

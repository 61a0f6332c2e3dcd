"""Output sets that take long: what is sampled is stored in FILE.partial, and the same command goes on with the rest.

Its first line says what decides the sets; every other line holds those of some prompts. Prompts are sampled so many at
a time, always the same ones together: the other completions of a batch can change the last bits of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossmith.durable.folder import lock, unlock
from lossmith.durable.inputs import Inputs
from lossmith.durable.stopping import Stopping
from lossmith.errors import RunError
from lossmith.feedback.output_set import json_line, write_rows
from lossmith.files import append_line
from lossmith.prompts import Prompt

__all__ = ["Part", "PartialSets", "in_parts", "part_size"]

TOGETHER = 256  # completions: twice what is decoded side by side, so that few rows wait for the longest


@dataclass(frozen=True)
class Part:
    """The sets of some prompts as rows of a sets file, and counts of what was left out of them."""

    sets: list[dict[str, Any]]
    counts: Mapping[str, int] = field(default_factory=dict)


def part_size(n: int) -> int:
    """Prompts that are sampled together, n completions each."""
    return max(1, TOGETHER // n)


def in_parts(
    prompts: Sequence[Prompt],
    n: int,
    make: Callable[[Sequence[Prompt], Callable[[int, int], None]], Part],
    stop: Stopping,
    file: PartialSets | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Part]:
    """What `make(some prompts, progress)` makes of all of them; `file` has what was made before, and keeps the rest."""
    size, total = part_size(n), len(prompts)
    parts = [] if file is None else list(file.parts)
    for start in range(size * len(parts), total, size):
        some = prompts[start : start + size]
        parts.append(make(some, lambda done, of, start=start: on_progress(start * n + done, total * n)))  # type: ignore[misc]
        if file is not None:
            file.add(parts[-1])
        stop.check()
    return parts


class PartialSets:
    """FILE.partial, which this process alone writes to. RunError: another one does; it is of another command."""

    def __init__(self, output: Path, now: Inputs) -> None:
        self.output, self.path = output, output.with_name(output.name + ".partial")
        self.parts: list[Part] = []
        self.notes: list[str] = []
        if self.path.is_dir():
            raise RunError(f"{str(self.path)!r} is a folder, and what is sampled is stored there. Move it away.")
        self.path.touch()
        lock(self.path)
        try:
            self._read(now)
        except BaseException:
            self.close()
            raise

    def _read(self, now: Inputs) -> None:
        head, *lines = self.path.read_bytes().splitlines(keepends=True) or [b""]
        if not head.endswith(b"\n"):  # the process was killed within the first line: nothing was sampled yet
            os.truncate(self.path, 0)
            append_line(self.path, now.as_line())
            return
        then = Inputs.parse(head)
        if then is None:
            raise RunError(f"{str(self.path)!r} is not what `lossmith sample` leaves when it stops. Move it away.")
        changed = [f"{key}: {change}" for key, change in then.changed_settings(now.settings).items()]
        changed += then.changed(now)
        if changed and lines:
            raise RunError(
                f"{str(self.path)!r} holds what was sampled already for {str(self.output)!r}, by another command or "
                f"other files: {'; '.join(changed)}. Put that back to go on with it, or delete it to start again."
            )
        complete = [line for line in lines if line.endswith(b"\n")]  # the last one may have been cut by a kill
        rows = map(json.loads, complete)
        self.parts = [Part(row["sets"], row.get("counts", row.get("told"))) for row in rows]  # older files say told
        os.truncate(self.path, len(head) * (not changed) + sum(map(len, complete)))
        if changed:
            append_line(self.path, now.as_line())
        moved = then.moved(now)
        if self.parts and moved:
            self.notes.append(f"not where it began ({'; '.join(moved)}): its last bits may differ.")

    @property
    def done(self) -> int:
        """Sets that are there."""
        return sum(len(part.sets) for part in self.parts)

    def add(self, part: Part) -> None:
        """Flushed to disk. RunError: it cannot be written."""
        append_line(self.path, json_line({"sets": part.sets, "counts": part.counts}))
        self.parts.append(part)

    def finish(self) -> None:
        """FILE, whole; and no FILE.partial any more."""
        write_rows(self.output, (row for part in self.parts for row in part.sets))
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process go on; a file in which nothing is yet goes."""
        unlock(self.path)
        if not self.parts and self.path.exists() and Inputs.parse(self.path.read_bytes()):
            self.path.unlink()

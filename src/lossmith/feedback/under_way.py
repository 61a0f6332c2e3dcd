"""Output sets that take long: what is sampled stands in FILE.partial, and the same command goes on with the rest.

Its first line says what decides the sets, every other one holds those of some prompts. Prompts are sampled so many at a
time, always the same ones together: what stands beside a completion in a batch can change its last bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossmith.durable.folder import hold, let_go
from lossmith.durable.inputs import Inputs
from lossmith.durable.stopping import Stopping
from lossmith.errors import RunError
from lossmith.feedback.output_set import json_line, write_rows
from lossmith.files import add_line
from lossmith.prompts import Prompt

__all__ = ["Part", "UnderWay", "in_parts", "part_size"]

TOGETHER = 256  # completions: twice what is decoded side by side, so that few rows wait for the longest


@dataclass(frozen=True)
class Part:
    """The sets of some prompts as rows of a sets file, and counts of what else there is to tell of them."""

    sets: list[dict[str, Any]]
    told: Mapping[str, int] = field(default_factory=dict)


def part_size(n: int) -> int:
    """Prompts that are sampled together, n completions each."""
    return max(1, TOGETHER // n)


def in_parts(
    prompts: Sequence[Prompt],
    n: int,
    make: Callable[[Sequence[Prompt], Callable[[int, int], None]], Part],
    stop: Stopping,
    file: UnderWay | None = None,
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


class UnderWay:
    """FILE.partial, which this process alone writes to. RunError: another one does; it is of another command."""

    def __init__(self, output: Path, now: Inputs) -> None:
        self.output, self.path = output, output.with_name(output.name + ".partial")
        self.parts: list[Part] = []
        self.notes: list[str] = []
        if self.path.is_dir():
            raise RunError(f"{str(self.path)!r} is a folder, and what is sampled is kept there. Move it away.")
        self.path.touch()
        hold(self.path)
        try:
            self._read(now)
        except BaseException:
            self.close()
            raise

    def _read(self, now: Inputs) -> None:
        head, *lines = self.path.read_bytes().splitlines(keepends=True) or [b""]
        if not head.endswith(b"\n"):  # a kill tore the first line, and nothing was sampled yet
            os.truncate(self.path, 0)
            add_line(self.path, now.as_line())
            return
        then = Inputs.parse(head)
        if then is None:
            raise RunError(f"{str(self.path)!r} is not what `lossmith sample` leaves when it stops. Move it away.")
        changed = [f"{key}: {change}" for key, change in then.changed_settings(now.settings).items()]
        changed += then.changed(now)
        if changed and lines:
            raise RunError(
                f"{str(self.path)!r} holds what was sampled already for {str(self.output)!r}, by another command or "
                f"other files: {'; '.join(changed)}. Put that back to go on with it, or delete it to begin anew."
            )
        whole = [line for line in lines if line.endswith(b"\n")]  # a kill may have torn the last one
        self.parts = [Part(**json.loads(line)) for line in whole]
        os.truncate(self.path, len(head) * (not changed) + sum(map(len, whole)))
        if changed:
            add_line(self.path, now.as_line())
        moved = then.moved(now)
        if self.parts and moved:
            self.notes.append(f"not where it began ({'; '.join(moved)}): its last bits may differ.")

    @property
    def done(self) -> int:
        """Sets that are there."""
        return sum(len(part.sets) for part in self.parts)

    def add(self, part: Part) -> None:
        """Flushed to disk. RunError: it cannot be written."""
        add_line(self.path, json_line({"sets": part.sets, "told": part.told}))
        self.parts.append(part)

    def finish(self) -> None:
        """FILE, whole; and no FILE.partial any more."""
        write_rows(self.output, (row for part in self.parts for row in part.sets))
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process go on; a file in which nothing is yet goes."""
        let_go(self.path)
        if not self.parts and self.path.exists() and Inputs.parse(self.path.read_bytes()):
            self.path.unlink()

"""What a run passes to its scorers: how a server may be called, and how long the run is."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ScorerSettings"]


@dataclass(frozen=True)
class ScorerSettings:
    """parallel    calls of a server at once
    per_minute  calls of a server in any minute, tries included; 0 for no limit
    batch       completions in one call of a server; 0 for all that are asked about at once
    updates     optimizer steps of the whole run (a function's trainer_state.max_steps)
    passes      how often the run sees each of its prompts
    """

    parallel: int = 1
    per_minute: int = 0
    batch: int = 0
    updates: int = 0
    passes: float = 0.0

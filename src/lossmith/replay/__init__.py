"""Recorded rollouts, read again: through other losses, and under other models."""

from lossmith.replay.formats import read_recorded
from lossmith.replay.recorded import Recorded, Row
from lossmith.replay.through import Replay, Replayed, replay

__all__ = ["Recorded", "Replay", "Replayed", "Row", "read_recorded", "replay"]

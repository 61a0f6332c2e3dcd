"""What the symbols of a formula stand for: the numbers of one batch, by completion i and token t."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from lossmith.losses import Batch
from lossmith.proofs.printed.dual import Dual, Value

__all__ = ["BY_COMPLETION", "BY_TOKEN", "POLICIES", "VOCABULARY", "Facts"]

VOCABULARY = {"π_θ": ("vocab_logp",), "π_T": ("teacher_vocab_logp",)}  # over all tokens at a position
# symbol -> field of Batch; where there are two, the first that the batch holds
POLICIES = {
    "π_θ": ("logp",), "π_old": ("old_logp", "logp"), "π_ref": ("ref_logp",), "π_T": ("teacher_logp",),
    "μ": ("behavior_logp", "old_logp"),
}  # fmt: skip
BY_TOKEN = {"H": ("entropy",), "V_θ": ("value",), "V": ("old_value", "value"), "Φ": ("potential",)}
BY_COMPLETION = {
    "b": ("baseline",), "R_greedy": ("reward_greedy",), "lag": ("lag",), "truncated": ("truncated",),
    "off_policy": ("off_policy",), "p": ("pair_probability",), "u": ("pair_weight",), "g": ("group",),
    "Λ_mismatched": ("mismatched_log_ratio",),
}  # fmt: skip
BY_PART = {"R": "reward_parts", "R_ref": "reference_reward"}  # K numbers of a completion


@dataclass
class Facts:
    """A batch whose tokens stand at the left of their rows. directions: of each field that carries a gradient."""

    batch: Batch
    directions: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> list[int]:
        return self.batch.lengths.tolist()

    @cached_property
    def live(self) -> list[int]:
        """Completions with a token."""
        return [i for i, length in enumerate(self.lengths) if length]

    @cached_property
    def groups(self) -> list[int]:
        """Each completion's group; its own where the batch has none."""
        return self.of(("group",)) if self.batch.group is not None else list(range(len(self.lengths)))

    def of(self, fields: tuple[str, ...]) -> list[Any]:
        """The numbers of the first of these fields that there is, as lists; with their slopes where they have any."""
        if fields not in self._read:
            name = next((name for name in fields if getattr(self.batch, name) is not None), fields[0])
            numbers = self.batch.require(name, "the formula").detach()
            direction = self.directions.get(name) if name == fields[0] else None
            found = numbers.tolist()
            if direction is not None:
                found = _with_slopes(found, direction.tolist())
            self._read[fields] = found
        return self._read[fields]

    @cached_property
    def _read(self) -> dict[tuple[str, ...], list[Any]]:
        return {}

    def score(self, i: int) -> float:
        """The reward of a completion, as given; that of one without a token too, where it is remembered."""
        kept = self.batch.masked_reward
        if not self.lengths[i]:
            return float(kept[i]) if kept is not None else 0.0
        reward = self.of(("reward",))[i]
        return float(sum(reward)) if isinstance(reward, list) else float(reward)

    def token_reward(self, i: int, t: int) -> float:
        """The reward of a token, as given: a completion's stands on its last one."""
        reward = self.of(("reward",))[i]
        if isinstance(reward, list):
            return float(reward[t])
        return float(reward) if t == self.lengths[i] - 1 else 0.0

    def given(self, name: str, i: int, t: int) -> Value:
        """What is `as given`: the advantage, or the critic's returns."""
        found: Value | list[Value] = self.of(("returns" if name == "G" else "advantage",))[i]
        return found[t] if isinstance(found, list) else found


def _with_slopes(x: Any, slope: Any) -> Any:
    """Numbers, in lists as deep as they are, with their slopes."""
    if not isinstance(x, list):
        return Dual(x, slope)
    return [_with_slopes(one, its) for one, its in zip(x, slope, strict=True)]

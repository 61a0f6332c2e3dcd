"""What the loop asks of a sampler, and the one that needs nothing else: the learning model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lossmith.policy import Policy, SamplingSettings, sample
from lossmith.policy.sharded import whole
from lossmith.prompts import Prompt
from lossmith.rollouts import Rollout

__all__ = ["Sampler", "TorchSampler"]


class Sampler(Protocol):
    """Writes completions with the policy as it was at the last `push`."""

    def push(self) -> dict[str, float]:
        """Give it the policy's weights as they are now, where it does not have them; returns what was measured."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        seed: int,
        step: int,
        on_progress: Callable[[int, int], None] | None = None,
        on_group: Callable[[list[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        """n completions of each prompt, prompt by prompt, a function of (seed, step, prompt, sample) and weights.

        on_progress(done, of) as completions end, on_group once all of a prompt have.
        """

    def close(self) -> None:
        """Give back what it holds."""


class TorchSampler:
    """The policy samples for itself: nothing to send, and nothing that could be stale."""

    def __init__(self, policy: Policy, settings: SamplingSettings) -> None:
        self.policy, self.settings = policy, settings

    def push(self) -> dict[str, float]:
        return {}

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        seed: int,
        step: int,
        on_progress: Callable[[int, int], None] | None = None,
        on_group: Callable[[list[Rollout]], None] | None = None,
    ) -> list[Rollout]:
        with whole(self.policy):
            return sample(
                self.policy, prompts, n, self.settings, seed=seed, step=step, on_progress=on_progress, on_group=on_group
            )

    def close(self) -> None:
        pass

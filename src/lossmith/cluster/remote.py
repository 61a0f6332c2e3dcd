"""What the loop takes for its sampler and its scorer: the processes that do the work, asked from here."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import Any

from lossmith.cluster.asking import asked
from lossmith.cluster.placement import import_ray
from lossmith.cluster.workers import About, Weights
from lossmith.errors import RunError
from lossmith.policy.sampling import OnGroup, OnProgress
from lossmith.prompts import Prompt
from lossmith.rollouts import Rollout, Score
from lossmith.training import Learner
from lossmith.training.shards import whole_weights

__all__ = ["RemoteSampler", "RemoteScorer", "together"]


class RemoteSampler:
    """Deals prompts out to the samplers, each call with the weights that it is to be answered by.

    Whatever becomes of a sampler, the texts are the same: they are a function of weights, seed, step, prompt, sample.
    """

    def __init__(self, processes: Sequence[Any], learner: Learner, probe: Prompt, context: int) -> None:
        self.processes, self.learner, self.probe, self.context = processes, learner, probe, context
        self.weights: Weights | None = None
        self.proofs: dict[int, dict[str, float]] = {}  # a share of the prompts: what its sampler measured of them
        self.measured: dict[str, float] = {}

    def push(self) -> dict[str, float]:
        """Put the weights where the samplers take them from, with the calls that come.

        What is returned is added to as the samplers answer.
        """
        policy = self.learner.policy
        if self.weights is None or self.weights.version != policy.version:
            tensors = {name: x.cpu() for name, x in whole_weights(policy, self.learner.shards).items()}
            held = import_ray().put(tensors)  # a copy: the learner goes on changing its own
            checksum = policy.checksum({name.removeprefix("policy."): x for name, x in tensors.items()})
            self.weights = Weights(policy.version, (held,), len(tensors), checksum)
            self.proofs, self.measured = {}, {"push_samplers": 0.0}
        return self.measured

    def as_of_now(self) -> RemoteSampler:
        """One that keeps the weights of the last push, and what is measured of them."""
        kept = copy.copy(self)
        kept.proofs, kept.measured = {}, {}
        return kept

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        seed: int,
        step: int,
        on_progress: OnProgress | None = None,
        on_group: OnGroup | None = None,
    ) -> list[Rollout]:
        weights = self.weights
        assert weights is not None, "push comes first"
        count = min(len(self.processes), len(prompts))
        parts = [list(prompts[k::count]) for k in range(count)]
        calls = [
            lambda process, part=part: process.sample.remote(weights, part, n, step, self.probe, self.context)
            for part in parts
        ]
        written: dict[str, list[Rollout]] = {}
        for k, (rollouts, checksum, measured) in asked("a sampler", self.processes, calls):
            if checksum != weights.checksum:
                raise RunError(
                    f"the weights of version {weights.version} did not arrive at sampler {k}: its checksum is "
                    f"{checksum[:12]}, and the learner's {weights.checksum[:12]}. Is it another version of Lossmith, "
                    "or another model?"
                )
            self.proofs[k] = measured
            self.measured |= together(self.proofs.values())
            for start in range(0, len(rollouts), n):
                group = rollouts[start : start + n]
                written[group[0].prompt.id] = group
                if on_group is not None:
                    on_group(group)
            if on_progress is not None:
                on_progress(sum(map(len, written.values())), len(prompts) * n)
        return [rollout for prompt in prompts for rollout in written[prompt.id]]

    def close(self) -> None:
        """They end with the cluster's placement group, not with the run: a learner that is lost finds them again."""


def together(proofs: Collection[Mapping[str, float]]) -> dict[str, float]:
    """The worst that any sampler measured of the weights that it was sent; of tokens and servers, the sum."""
    how: dict[str, Callable[..., float]] = {"push_tensors": min, "push_tokens": sum, "push_restarts": sum}
    names = {name for proof in proofs for name in proof}
    worst = {name: how.get(name, max)([proof[name] for proof in proofs if name in proof]) for name in sorted(names)}
    return worst | {"push_samplers": float(len(proofs))}


class RemoteScorer:
    """Asks the scorers by turns."""

    waits = True  # it is asked as soon as a group is written

    def __init__(self, processes: Sequence[Any]) -> None:
        self._processes, self._turn = processes, itertools.count()
        about: About = self._ask(lambda process: process.about.remote())
        self.name, self.reading, self._columns = about.name, about.reading, about.columns

    def columns_read(self, names: Set[str]) -> Set[str]:
        return self._columns & names

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self.score_within(rollouts, None)

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        scores: list[Score] = self._ask(lambda process: process.score.remote(list(rollouts), timeout))
        return scores

    def verify(self) -> None:
        """ScorerError: one of them was changed since it was loaded."""
        for process in self._processes:
            for _ in asked("a scorer", [process], [lambda p: p.verify.remote()]):
                pass

    def _ask(self, call: Callable[[Any], Any]) -> Any:
        at = next(self._turn) % len(self._processes)
        ((_, answer),) = asked("a scorer", [*self._processes[at:], *self._processes[:at]], [call])
        return answer

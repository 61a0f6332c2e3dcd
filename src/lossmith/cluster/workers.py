"""The processes that write and score completions. Each call says all that it needs, so any of them can answer it, and
one that was lost is simply asked again."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lossmith.cluster.placement import import_ray
from lossmith.errors import RunError
from lossmith.prompts import Prompt
from lossmith.rollouts import Rollout, Score
from lossmith.samplers import Sampler, VllmSampler
from lossmith.scorers.scorer import ask, bind_scorer, columns_read, verify_scorer
from lossmith.training.prepare import plan as plan_of
from lossmith.training.prepare import policy_of, scorer_of
from lossmith.training.recipe import Recipe
from lossmith.training.shards import named_weights
from lossmith.training.sharing import sampler_of

__all__ = ["About", "SamplerProcess", "ScorerProcess", "Weights", "at_work_in"]

STARTS = 3  # of a server over the same work


@dataclass(frozen=True)
class Weights:
    """The policy's weights of a version, in the cluster's store of objects, and what proves that they arrived."""

    version: int
    held: tuple[Any, ...]  # a reference, wrapped so that it is fetched only where it is needed
    tensors: int
    checksum: str


def at_work_in(folder: str) -> None:
    """Files are named from the folder that the command was given in, where this machine has it."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))


class SamplerProcess:
    """Writes completions with its own copy of the policy."""

    def __init__(self, recipe: dict[str, Any], folder: str) -> None:
        at_work_in(folder)
        self.recipe = Recipe.make("the recipe", **recipe)
        self.policy = policy_of(self.recipe)
        self.sampler: Sampler | None = None
        self.checksum = ""  # of the weights that it has

    def sample(
        self, weights: Weights, prompts: Sequence[Prompt], n: int, step: int, probe: Prompt, context: int
    ) -> tuple[list[Rollout], str, dict[str, float]]:
        """(n completions of each prompt, the checksum of what wrote them, what was measured when weights arrived).

        A server that has died is started again, with the weights as they are, and asked the same.
        """
        if self.checksum != weights.checksum:
            self._take(weights)
        for died in range(STARTS):
            try:
                sampler = self.sampler = self.sampler or self._opened(probe, context)
                measured = {"push_tensors": float(weights.tensors)} | sampler.push()
                rollouts = sampler.sample(prompts, n, seed=self.recipe.seed, step=step)
                return rollouts, self.checksum, measured | ({"push_restarts": float(died)} if died else {})
            except RunError as error:
                if not (isinstance(self.sampler, VllmSampler) and self.sampler.gone()):
                    raise RunError(f"a sampler on {socket.gethostname()}: {error}") from None
                self.sampler.close()
                self.sampler = None
                last = str(error)
        raise RunError(
            f"the vLLM server of a sampler on {socket.gethostname()} died {STARTS} times over the same work. Out of "
            f"memory? Ask for fewer samplers, or give its cache less. The last time: {last}"
        )

    def _opened(self, probe: Prompt, context: int) -> Sampler:
        """The recipe's. What a server says stays in the folder, the rest goes with it."""
        serves = self.recipe.sampler == "vllm"
        place = Path(tempfile.mkdtemp(prefix="lossmith-sampler-")) if serves else Path()
        return sampler_of(self.recipe, self.policy, place, probe, context)

    @torch.no_grad()
    def _take(self, weights: Weights) -> None:
        tensors = import_ray().get(weights.held[0])
        for name, x in named_weights(self.policy):
            x.copy_(tensors[name])
        self.policy.version = weights.version
        self.checksum = self.policy.checksum()
        if isinstance(self.sampler, VllmSampler):
            self.sampler.outdated()  # a learner that went back makes a version again, and not always the same


@dataclass(frozen=True)
class About:
    """What a run says of its scorer."""

    name: str
    columns: frozenset[str]  # those that it reads
    reading: str | None


class ScorerProcess:
    """Scores completions as a scorer of this machine does."""

    def __init__(self, recipe: dict[str, Any], folder: str) -> None:
        at_work_in(folder)
        self.recipe = Recipe.make("the recipe", **recipe)
        self.plan = plan_of(self.recipe)
        self.scorer = scorer_of(self.plan, self.recipe.scorer)
        if hasattr(self.scorer, "bind"):
            bind_scorer(self.scorer, policy_of(self.recipe))

    def about(self) -> About:
        columns = frozenset(columns_read(self.scorer, set(self.plan.prompts.columns)))
        return About(self.scorer.name, columns, getattr(self.scorer, "reading", None))

    def score(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        return ask(self.scorer, rollouts, timeout)

    def verify(self) -> None:
        """ScorerError: it was changed since it was loaded."""
        verify_scorer(self.scorer)

"""How the ranks of a run share its work: prompts are dealt out whole, so a group is sampled and scored by one rank.

What a rank samples does not depend on which rank it is: random numbers are keyed by (seed, step, prompt, sample).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from lossmith.durable.inputs import Inputs
from lossmith.errors import RecipeError
from lossmith.policy import Policy
from lossmith.prompts import Prompt
from lossmith.ranks import Ranks
from lossmith.rollouts import Rollout
from lossmith.samplers import Sampler, TorchSampler, open_vllm
from lossmith.scorers import Scorer, score_rollouts
from lossmith.training.clock import Clock
from lossmith.training.recipe import Recipe
from lossmith.training.run import RunFolder

__all__ = ["Sampling", "agree_on", "check_ranks", "in_order", "sampler_of"]


@dataclass(frozen=True)
class Sampling:
    """A rank's task "sample": n scored completions of each prompt that is its own, and the seconds it took by part."""

    recipe: Recipe
    sampler: Sampler
    scorer: Scorer
    ranks: Ranks
    tell: Callable[[str, int, int], None] = lambda what, done, total: None  # told what is done, and how far it is

    def __call__(self, prompts: Sequence[Prompt], n: int, step: int) -> tuple[list[Rollout], dict[str, float]]:
        """A scorer that merely waits is asked as soon as a group is written."""
        mine, clock = prompts[self.ranks.rank :: self.ranks.size], Clock()
        ahead = getattr(self.scorer, "waits", False)
        asked: dict[str, Future[list[Rollout]]] = {}
        pool = ThreadPoolExecutor(self.recipe.scorer_parallel)
        try:
            with clock("sample"):
                rollouts = self.sampler.sample(
                    mine, n, seed=self.recipe.seed, step=step,
                    on_group=lambda group: (
                        asked.update({group[0].prompt.id: pool.submit(self._score, group)}) if ahead else None
                    ),
                    on_progress=lambda done, total: self.tell("sampling", done, total),
                )  # fmt: skip
            with clock("score"):
                self.tell("scoring", 0, len(rollouts))
                if not ahead:
                    return self._score(rollouts), clock.read()
                scored: list[Rollout] = []
                for prompt in mine:
                    self.tell("scoring", len(scored), len(rollouts))
                    scored += asked[prompt.id].result()
            return scored, clock.read()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # whoever stops the run does not wait for a server

    def _score(self, rollouts: list[Rollout]) -> list[Rollout]:
        recipe = self.recipe
        return score_rollouts(self.scorer, rollouts, on_error=recipe.scorer_errors, timeout=recipe.scorer_timeout)


def check_ranks(recipe: Recipe, ranks: Ranks, resumed: bool) -> None:
    """RecipeError: one server for several ranks; weights in parts, and a new run of one process."""
    if recipe.shard and ranks.size == 1 and not resumed:
        raise RecipeError(
            "shard = true deals the weights out to several processes, and this run has one: start it with --ranks N or "
            "torchrun (docs/many-processes.md), or leave shard out."
        )
    if recipe.sampler == "vllm" and ranks.size > 1:
        raise RecipeError(
            f"sampler = 'vllm' takes its weights from one process, and this run has {ranks.size} ranks: train with "
            "one, or with sampler = 'torch'."
        )


def sampler_of(recipe: Recipe, policy: Policy, folder: RunFolder, probe: Prompt, longest: Prompt) -> Sampler:
    """The recipe's. RunError: its server does not answer or is of another model; the folder is there to be resumed.

    probe: whose completions are compared after a push. longest: the prompt that decides how much room there must be.
    """
    if recipe.sampler == "torch":
        return TorchSampler(policy, recipe.sampling)
    context = len(policy.encode(longest)) + recipe.max_tokens
    try:
        return open_vllm(
            policy, recipe.sampling, url=recipe.sampler_url, timeout=recipe.sampler_timeout,
            folder=folder.path / "sampler", probe=probe, context=context,
        )  # fmt: skip
    except BaseException:
        folder.close()
        raise


def in_order(prompts: Sequence[Prompt], parts: Iterable[Iterable[Rollout]]) -> list[Rollout]:
    """What the ranks sampled, prompt by prompt as they were asked."""
    own = {p.id: p for p in prompts}
    written: dict[str, list[Rollout]] = {}
    for rollout in (r for part in parts for r in part):
        written.setdefault(rollout.prompt.id, []).append(dataclasses.replace(rollout, prompt=own[rollout.prompt.id]))
    return [rollout for prompt in prompts for rollout in written.get(prompt.id, [])]


def agree_on(ranks: Ranks, recipe: Recipe, inputs: Inputs) -> None:
    """RunError: the ranks were given different recipes, prompts, code or models."""
    of_its_own = {*recipe.free, "device"} - {"shard"}
    ranks.agree("the recipe", {key: value for key, value in inputs.settings.items() if key not in of_its_own})
    ranks.agree("what decides the run", inputs.decisive)

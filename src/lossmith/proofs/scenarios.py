"""The situations in which a loss is enumerated: further and further off-policy, easy and hard prompts, and the two
estimators that its noise is compared with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lossmith.errors import quiet_traps
from lossmith.losses import (
    KL,
    LOO,
    Batch,
    CompletionLoss,
    LogP,
    Normalizer,
    NoScale,
    PolicyLoss,
    Raw,
    SeqMeanTokenSum,
)
from lossmith.proofs.enumeration import Bias, Tree, World, bias, default_world, group_gradients
from lossmith.proofs.random_batches import takes_normalizer

__all__ = [
    "DISTANCES",
    "SUCCESS",
    "Difficulty",
    "Distance",
    "baseline_variances",
    "difficulty",
    "graded_world",
    "moved_world",
    "normalized",
    "off_policy",
    "unscaled",
    "without_kl",
]

DISTANCES = (0.01, 0.1, 0.5)  # nats, KL(behavior ‖ policy) of completions
DIRECTIONS = 4  # random directions in which the behavior policy stands away
SUCCESS = (0.9, 0.5, 0.1)  # probability that the policy solves the prompt: easy, even, hard
GROUP = 4  # completions of a prompt


def without_kl(loss: Any) -> Any:
    """The loss without a KL penalty taken off its reward, whose expected gradient should then be that of E[r]."""
    if isinstance(loss, PolicyLoss) and loss.kl.in_reward:
        with quiet_traps():
            return loss.replace(kl=KL())
    return loss


# -- off-policy -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """nats: KL(behavior ‖ policy) of completions. The cosine of the expected step of the policy term and ∇E[r] at the
    policy, over several directions: its mean and the worst of them; residual: the mean, see Bias.
    """

    nats: float
    cosine: float
    worst: float
    residual: float


def moved_world(nats: float, direction: int = 0) -> World:
    """The default world, sampled by a policy that is this far away in one of several random directions."""
    world = default_world()
    draw = torch.Generator().manual_seed(77 + direction)
    step = torch.randn(world.tree.size, generator=draw, dtype=torch.float64)

    def distance(size: float) -> float:
        return float(world.tree.sequence_kl(world.theta + size * step, world.theta))

    return world.sampled_by(world.theta + _solve(distance, nats) * step)


def off_policy(
    loss: Any,
    distances: tuple[float, ...] = DISTANCES,
    size: int = 3,
    directions: int = DIRECTIONS,
    sampler_only: bool = False,
) -> list[Distance]:
    """The loss, without a KL penalty in the reward, on groups sampled by policies at these distances.

    sampler_only: the old policy is the policy itself, and only the sampler stands away from both, as an inference
    engine does whose numbers are not the trainer's: what a mismatch correction is for.
    """
    loss, found = without_kl(loss), []
    for nats in distances:
        some: list[Bias] = []
        for direction in range(directions):
            world = moved_world(nats, direction)
            world = dataclasses.replace(world, old=world.theta) if sampler_only else world
            gradients = group_gradients(loss, world, size, main=True)
            some.append(bias(gradients, world.true_gradient(), gradients.main))
        cosines = [one.cosine for one in some]
        residual = sum(one.residual for one in some) / directions
        found.append(Distance(nats, sum(cosines) / directions, min(cosines), residual))
    return found


def _solve(rising: Callable[[float], float], target: float) -> float:
    """x > 0 with rising(x) = target, by bisection."""
    low, high = 0.0, 1.0
    while rising(high) < target:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return high


# -- easy and hard prompts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difficulty:
    """success: probability of a reward of 1. scale: how much of ∇E[r] the loss follows on such a prompt."""

    success: float
    scale: float


def graded_world(success: float) -> World:
    """A prompt with two answers of one token, right (reward 1) and wrong (0); the policy is right this often."""
    theta = torch.tensor([math.log(success), math.log(1 - success)], dtype=torch.float64)
    reward = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return World(Tree(2, 1), theta, theta, torch.zeros_like(theta), reward, truncates=False)


def difficulty(loss: Any, size: int = 16, success: tuple[float, ...] = SUCCESS) -> list[Difficulty]:
    """How much of ∇E[r] the loss follows on prompts that are solved more or less often (rewards 0 and 1).

    Answers of one token: no length is in play. All groups are enumerated (size + 1 of them).
    """
    loss, found = without_kl(loss), []
    for p in success:
        world = graded_world(p)
        gradients = group_gradients(loss, world, size, main=True)
        found.append(Difficulty(p, bias(gradients, world.true_gradient(), gradients.main).scale))
    return found


def unscaled(loss: Any) -> PolicyLoss | None:
    """The loss without what it divides its advantages by; None where there is nothing to take away."""
    if not isinstance(loss, PolicyLoss) or not loss.advantage_scale.acts:
        return None
    with quiet_traps():
        return dataclasses.replace(loss, advantage_scale=NoScale())


# -- what its normalizer does ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normalized:
    """The loss divided by constant counts, in place of those of the batch: what it is in a large batch, whose number of
    tokens hardly varies.
    """

    loss: Any
    normalizer: Normalizer

    @property
    def name(self) -> str:
        return str(self.loss.name)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.loss.needs)

    def __call__(self, batch: Batch) -> Any:
        return self.loss(batch, self.normalizer)


def normalized(loss: Any, world: World, size: int = GROUP) -> Normalized | None:
    """With the counts that groups of this size have on average; None where no normalizer can be given."""
    if not takes_normalizer(loss) or isinstance(loss, CompletionLoss):  # which averages over pairs, say, not tokens
        return None
    tokens = float(world.probability @ world.tree.mask.sum(1).double()) * size
    return Normalized(loss, Normalizer(tokens=round(tokens), sequences=size, groups=1))


# -- what noise is compared with -------------------------------------------------------------------------------------


@cache
def baseline_variances(size: int = GROUP) -> dict[str, float]:
    """Variance of REINFORCE without a baseline and with leave-one-out, both with expected gradient ∇E[r] exactly."""
    world = default_world()
    losses = {
        name: PolicyLoss(name=name, advantage=advantage, trust=LogP(), aggregate=SeqMeanTokenSum())
        for name, advantage in (("reinforce", Raw()), ("leave_one_out", LOO()))
    }
    return {name: group_gradients(loss, world, size).variance() for name, loss in losses.items()}

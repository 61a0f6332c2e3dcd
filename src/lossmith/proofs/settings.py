"""The situations in which a loss is enumerated: further and further off-policy, easy and hard prompts, and the two
estimators that its noise is compared with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lossmith.losses import LeaveOneOut, LogP, NoScale, PolicyLoss, Raw, SeqMeanTokenSum
from lossmith.proofs.enumeration import Bias, GroupGradients, Tree, World, bias, default_world, group_gradients

__all__ = [
    "DISTANCES",
    "SUCCESS",
    "Difficulty",
    "Distance",
    "baseline_variances",
    "difficulty",
    "graded_world",
    "main_term",
    "moved_world",
    "off_policy",
    "unscaled",
]

DISTANCES = (0.01, 0.1, 0.5)  # nats, KL(behaviour ‖ policy) of completions
SUCCESS = (0.9, 0.5, 0.1)  # probability that the policy solves the prompt: easy, even, hard
GROUP = 4  # completions of a prompt


def main_term(gradients: GroupGradients) -> str:
    """The term that follows the reward: the policy term where the loss has one."""
    return "policy" if "policy" in gradients.terms else "loss"


# -- off-policy -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """nats: KL(behaviour ‖ policy) of completions. bias: of the policy term against ∇E[r] at the policy."""

    nats: float
    bias: Bias


def moved_world(nats: float, seed: int = 0) -> World:
    """The default world, sampled by a policy that is this far away in a random direction."""
    world = default_world(seed)
    draw = torch.Generator().manual_seed(seed + 77)
    direction = torch.randn(world.tree.size, generator=draw, dtype=torch.float64)

    def distance(step: float) -> float:
        return float(world.tree.sequence_kl(world.theta + step * direction, world.theta))

    return world.sampled_by(world.theta + _solve(distance, nats) * direction)


def off_policy(loss: Any, distances: tuple[float, ...] = DISTANCES, size: int = 3, beta: float = 0.0) -> list[Distance]:
    """The loss on groups sampled by policies at these distances. beta: of the KL that acts through the reward."""
    found = []
    for nats in distances:
        world = moved_world(nats)
        gradients = group_gradients(loss, world, size)
        found.append(Distance(nats, bias(gradients, world.true_gradient(beta), main_term(gradients))))
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
    residual: float


def graded_world(success: float, seed: int = 0) -> World:
    """A prompt with rewards 0 and 1 that the policy solves with this probability."""
    world = default_world(seed)
    tree, solved = world.tree, 3
    toward = _toward(tree, solved)

    def solves(step: float) -> float:
        return float(tree.logp(world.theta + (step - 20) * toward)[solved].exp())

    theta = world.theta + (_solve(solves, success) - 20) * toward
    reward = torch.zeros(len(tree.sequences), dtype=torch.float64)
    reward[solved] = 1.0
    return World(tree, theta, theta, world.ref, reward)


def _toward(tree: Tree, row: int) -> Tensor:
    """The direction that raises the logit of each token of one completion. [P]"""
    direction = torch.zeros(tree.size, dtype=torch.float64)
    for t in range(int(tree.mask[row].sum())):
        direction[tree.state[row, t] * tree.vocabulary + tree.token[row, t]] = 1.0
    return direction


def difficulty(loss: Any, size: int = GROUP, success: tuple[float, ...] = SUCCESS) -> list[Difficulty]:
    """How much of ∇E[r] the loss follows on prompts that are solved more or less often (rewards 0 and 1)."""
    found = []
    for p in success:
        world = graded_world(p)
        gradients = group_gradients(loss, world, size)
        one = bias(gradients, world.true_gradient(), main_term(gradients))
        found.append(Difficulty(p, one.scale, one.residual))
    return found


def unscaled(loss: Any) -> PolicyLoss | None:
    """The loss without what it divides its advantages by; None where there is nothing to take away."""
    if not isinstance(loss, PolicyLoss) or isinstance(loss.scale, NoScale):
        return None
    return dataclasses.replace(loss, scale=NoScale())


# -- what noise is compared with -------------------------------------------------------------------------------------


@cache
def baseline_variances(size: int = GROUP) -> dict[str, float]:
    """Variance of REINFORCE without a baseline and with leave-one-out, both with expected gradient ∇E[r] exactly."""
    world = default_world()
    losses = {
        name: PolicyLoss(name=name, advantage=advantage, trust=LogP(), aggregate=SeqMeanTokenSum())
        for name, advantage in (("reinforce", Raw()), ("leave_one_out", LeaveOneOut()))
    }
    return {name: group_gradients(loss, world, size).variance() for name, loss in losses.items()}

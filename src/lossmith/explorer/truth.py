"""The fourth screen: a policy small enough to know everything about, and the losses taking steps on it.

Seven completions of one or two tokens (`lossmith.proofs.enumeration`). Each step follows the loss's expected gradient,
summed over every group that could be sampled, so what is seen is the loss and no luck.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError, LossmithError
from lossmith.explorer.chosen import build
from lossmith.explorer.numbers import printed
from lossmith.explorer.state import State
from lossmith.proofs.enumeration import World, bias, default_world, group_gradients

__all__ = ["MEASURES", "Walk", "truth", "world_of"]

MEASURES = {
    "reward": "E[r], what the scorer gives",
    "gold": "E[true reward]",
    "kl": "KL(π ‖ reference), nats",
    "entropy": "entropy of the completions, nats",
    "cosine": "cosine of the expected step and ∇E[r]",
    "snr": "signal to noise of one group's step: ‖mean‖² / variance",
}
_PATIENCE = 0.5  # seconds of computing in one answer; the page asks again for the rest
_LETTERS = ("a", "b", "end")


def world_of(seed: int, proxy: float) -> tuple[World, Tensor]:
    """(the small world whose reward is what the scorer gives, the true reward [S])."""
    world = default_world(seed)
    error = torch.randn(len(world.reward), generator=torch.Generator().manual_seed(seed + 1000), dtype=torch.float64)
    return dataclasses.replace(world, reward=world.reward + proxy * error), world.reward


@dataclass
class Walk:
    """A loss going down its expected gradient from the start of a world; as far as it was asked to."""

    call: str
    world: World
    gold: Tensor
    size: int
    rate: float
    reuse: int
    thetas: list[Tensor] = field(default_factory=list)
    points: list[dict[str, float]] = field(default_factory=list)
    error: str = ""

    def advance(self, steps: int, deadline: float) -> bool:
        """Measure all points up to this one; whether there was time for it."""
        while len(self.points) <= steps and not self.error:
            if time.monotonic() > deadline:
                return False
            try:
                self._next()
            except LossmithError as error:
                self.error = str(error)
        return True

    def _next(self) -> None:
        """Measure where it stands, and take the step from there."""
        at = len(self.points)
        if not self.thetas:
            self.thetas.append(self.world.theta)
        theta, behavior = self.thetas[at], self.thetas[at - at % self.reuse]
        world = dataclasses.replace(self.world, theta=theta, behavior=behavior, old=behavior)
        gradients = group_gradients(build(self.call), world, self.size)
        step = gradients.mean()
        if not bool(torch.isfinite(step).all()):
            raise LossError(f"step {at + 1}: the expected gradient is not finite; take a smaller rate.")
        found, p = bias(gradients, world.true_gradient(), gradients.main), world.tree.logp(theta).exp()
        self.points.append(
            {
                "reward": float(p @ world.reward),
                "gold": float(p @ self.gold),
                "kl": float(world.tree.sequence_kl(theta, world.ref)),
                "entropy": float(-(p * world.tree.logp(theta)).sum()),
                "cosine": found.cosine,
                "snr": found.signal_to_noise,
            }
        )
        self.thetas.append(theta - self.rate * step)


@lru_cache(maxsize=64)
def _walk(call: str, seed: int, proxy: float, size: int, rate: float, reuse: int) -> Walk:
    return Walk(call, *world_of(seed, proxy), size, rate, reuse)


def truth(calls: list[str], state: State, patience: float = _PATIENCE) -> dict[str, Any]:
    """The walks of these losses. done is false where there was no time for all: ask again."""
    deadline = time.monotonic() + patience
    walks = [_walk(c, state.seed, state.proxy, state.size, state.rate, state.reuse) for c in calls]
    done = [walk.advance(state.steps, deadline) for walk in walks]
    world, gold = world_of(state.seed, state.proxy)
    tree = world.tree
    start, ref = (tree.logp(theta).exp() for theta in (world.theta, world.ref))
    return {
        "done": all(done),
        "steps": state.steps,
        "measures": [{"name": name, "words": words} for name, words in MEASURES.items()],
        "completions": [
            {
                "text": " ".join(_LETTERS[v] for v in tree.sequences[s]),
                "reward": printed(float(world.reward[s])),
                "gold": printed(float(gold[s])),
                "start": _share(start[s]),
                "ref": _share(ref[s]),
                "now": [_share(_now(walk, state.steps)[s]) for walk in walks],
            }
            for s in range(len(gold))
        ],
        "walks": [_shown(walk, state.steps) for walk in walks],
    }


def _now(walk: Walk, steps: int) -> Tensor:
    theta = walk.thetas[min(steps, len(walk.points) - 1)] if walk.points else walk.world.theta
    return walk.world.tree.logp(theta).exp()


def _share(x: Tensor) -> dict[str, Any]:
    return {"p": float(x), "text": printed(float(x))}


def _shown(walk: Walk, steps: int) -> dict[str, Any]:
    points = walk.points[: steps + 1]
    finite = [{k: (v if abs(v) < 1e30 else None) for k, v in p.items()} for p in points]
    return {
        "error": walk.error,
        "points": finite,
        "texts": [{k: printed(v) for k, v in p.items()} for p in points],
    }

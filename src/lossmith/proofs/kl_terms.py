"""What a KL term regularizes: its expected gradient, alone, against the KL gradients that it could be.

Three candidates: the reverse KL(π‖π_ref) and the forward KL(π_ref‖π) at sampled states (the states held fixed), and
the reverse KL of whole completions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import quiet_traps
from lossmith.losses import (
    KL,
    LogP,
    NoTrust,
    PolicyLoss,
    Raw,
    SeqMeanTokenSum,
    SequenceSumRatio,
    TokenRatio,
)
from lossmith.proofs.enumeration import World, default_world, group_gradients
from lossmith.proofs.scenarios import moved_world

__all__ = ["KLRow", "Push", "kl_push", "kl_table"]

SAME = 1e-9  # relative difference below which two gradients are the same


@dataclass(frozen=True)
class KLRow:
    """One choice of KL term: relative distance of its expected gradient to each candidate, and what it is."""

    term: str
    norm: float  # of the expected gradient, β = 1
    reverse: float  # from ∇KL(π‖π_ref) at sampled states
    forward: float  # from ∇KL(π_ref‖π) at sampled states
    completions: float  # from ∇KL(π‖π_ref) of completions
    regularizes: str


def _choices() -> dict[str, PolicyLoss]:
    """Every KL term, with β = 1 and no reward beside it."""
    plain = {"advantage": Raw(), "aggregate": SeqMeanTokenSum()}
    kinds: dict[str, dict[str, Any]] = {
        f"{k} in the loss": {"kl": KL(1.0, k)} for k in ("k1", "k2", "k3", "abs", "full")
    }
    for k in ("k1", "k3"):
        weighted = KL(1.0, k, ratio_weight=True)
        kinds[f"{k} by the token ratio"] = {"kl": weighted, "trust": NoTrust(), "ratio_level": TokenRatio()}
    kinds["k1 by the ratio of completions"] = {
        "kl": KL(1.0, "k1", ratio_weight=True), "trust": NoTrust(), "ratio_level": SequenceSumRatio()
    }  # fmt: skip
    for k in ("k1", "k3", "abs"):
        kinds[f"{k} straight through"] = {"kl": KL(1.0, k, straight_through=True)}
    kinds["k1 in the reward"] = {"kl": KL(1.0, "k1", "reward")}
    with quiet_traps():
        return {label: PolicyLoss(**{"name": label, "trust": LogP(), **plain, **kind}) for label, kind in kinds.items()}


def kl_table(seed: int = 0) -> list[KLRow]:
    """Every KL choice on-policy, one completion at a time, β = 1, all rewards 0."""
    world = default_world(seed)
    world = World(world.tree, world.theta, world.behavior, world.ref, torch.zeros_like(world.reward))
    return [_row(label, loss, world) for label, loss in _choices().items()]


def _row(label: str, loss: PolicyLoss, world: World) -> KLRow:
    gradients = group_gradients(loss, world, 1)
    got = gradients.mean("kl" if "kl" in gradients.terms else "loss")
    candidates = _candidates(world)
    away = {name: float((got - one).norm() / one.norm()) for name, one in candidates.items()}
    names = {
        "reverse": "reverse KL(π‖π_ref) at sampled states",
        "forward": "forward KL(π_ref‖π) at sampled states",
        "completions": "reverse KL(π‖π_ref) of completions",
    }
    same = [names[name] for name, distance in away.items() if distance < SAME]
    norm = float(got.norm())
    nothing = norm < SAME * float(candidates["reverse"].norm())
    return KLRow(label, norm, **away, regularizes="nothing" if nothing else (same or ["neither"])[0])


def _candidates(world: World) -> dict[str, Tensor]:
    tree, ref, at = world.tree, world.ref, world.behavior
    return {
        "reverse": world.gradient(lambda t: tree.state_kl(at, t, ref)),
        "forward": world.gradient(lambda t: tree.state_kl(at, ref, t)),
        "completions": world.gradient(lambda t: tree.sequence_kl(t, ref)),
    }


@dataclass(frozen=True)
class Push:
    """The expected descent step of a loss's KL term alone, against the step that lowers KL(π‖π_ref) of completions.

    cosine: 1 pulls to the reference, -1 pushes away from it. size: ‖step‖ / ‖β∇KL‖.
    """

    sampler: str
    nats: float  # KL(sampler ‖ policy) of completions
    cosine: float
    size: float


def kl_push(loss: Any, beta: float, size: int = 2) -> list[Push]:
    """The loss's term "kl": on-policy, sampled by a policy 0.1 nats away, and sampled by the reference. [] without."""
    world = default_world()
    settings = {
        "the policy itself": world,
        "an old policy 0.1 nats away": moved_world(0.1),
        "the reference": world.sampled_by(world.ref),
    }
    found = []
    for sampler, setting in settings.items():
        gradients = group_gradients(loss, setting, size)
        if "kl" not in gradients.terms:
            return []
        true = beta * _candidates(setting)["completions"]
        got = gradients.mean("kl")
        ratio = float(got.norm() / true.norm()) if float(true.norm()) else math.nan
        cosine = float(got @ true / (got.norm() * true.norm())) if ratio > SAME else 0.0
        nats = float(setting.tree.sequence_kl(setting.behavior, setting.theta))
        found.append(Push(sampler, nats, cosine, ratio if ratio > SAME else 0.0))
    return found

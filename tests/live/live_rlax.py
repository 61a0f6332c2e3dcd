"""rlax's clipped surrogate and its generalized advantage estimation, in JAX on the CPU."""

from __future__ import annotations

import functools
import os
import warnings
from types import SimpleNamespace

import numpy as np
import torch

from live_case import Case, Fields, Params
from live_ranges import Ranges, nothing, uniform


@functools.cache
def library() -> SimpleNamespace:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jax
        import rlax

        jax.config.update("jax_enable_x64", True)
        return SimpleNamespace(jax=jax, rlax=rlax)


def clipped_surrogate(fields: Fields, params: Params) -> dict[str, torch.Tensor]:
    """rlax has no mask: it is given the valid tokens only."""
    it, mask = library(), fields["mask"].numpy()
    old = fields["old_logp"].numpy()[mask]
    advantage = np.broadcast_to(fields["advantage"].numpy()[:, None], mask.shape)[mask]

    def loss(logp: np.ndarray) -> np.ndarray:
        return it.rlax.clipped_surrogate_pg_loss(it.jax.numpy.exp(logp - old), advantage, params["clip_low"])

    value, slope = it.jax.value_and_grad(loss)(it.jax.numpy.asarray(fields["logp"].numpy()[mask]))
    gradient = np.zeros(mask.shape)
    gradient[mask] = np.asarray(slope)
    return {"loss": torch.tensor(float(value), dtype=torch.float64), "grad_logp": torch.from_numpy(gradient)}


def gae(fields: Fields, params: Params) -> dict[str, torch.Tensor]:
    """One sequence at a time, valid tokens only; the value after the last one is zero."""
    advantage = torch.zeros(fields["mask"].shape, dtype=torch.float64)
    for row, mask in enumerate(fields["mask"]):
        values = np.append(fields["value"][row][mask].numpy(), 0.0)
        discount = np.full(len(values) - 1, params["gamma"])
        found = library().rlax.truncated_generalized_advantage_estimation(
            fields["reward"][row][mask].numpy(), discount, params["lam"], values
        )
        advantage[row, mask] = torch.from_numpy(np.array(found))
    return {"advantage": advantage}


def symmetric(rng: np.random.Generator) -> Params:
    epsilon = float(rng.uniform(0.05, 0.4))
    return {"clip_low": epsilon, "clip_high": epsilon, "aggregate": "token_mean", **nothing(rng)}


GAE = Ranges({"advantage": "gae", "advantage_scale": "none", "gamma": uniform(0.8, 1.0), "lam": uniform(0.5, 1.0)})

CASES = [
    Case("rlax", "ppo", "ppo", symmetric, clipped_surrogate),
    Case("rlax", "adv_gae", "advantage", GAE, gae, fields=("token_reward", "value")),
]

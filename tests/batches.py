"""What the loss tests share: losses without their warnings, and ragged batches with every field a loss may need."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lossmith.losses import CATALOGUE, Batch, Loss, LossOutput, PolicyLoss, TrapWarning, example_loss, get_loss

torch.set_num_threads(1)  # the tensors are tiny

EVERY = list(CATALOGUE)  # presets and losses of whole completions included
COMPLETION = [name for name in EVERY if "@" not in name and not isinstance(example_loss(name), PolicyLoss)]
# Terms that stand alone, without a policy term and without rewards: a KL, a critic's loss, divergences from a teacher.
TERMS = [name for name in EVERY if "@" not in name and name not in COMPLETION and not example_loss(name).advantage.acts]
NAMES = [name for name in EVERY if "@" not in name and name not in (*COMPLETION, *TERMS)]
LEAVES = ("logp", "value", "entropy", "full_kl", "vocab_logp")  # what carries gradient
LENGTHS = (7, 1, 3, 7, 0, 4, 2, 6, 5)  # a full row, a single token, and a row without a token
GROUPS = (5, 2, 5, 9, 2, 5, 2, 9, 7)  # interleaved and uneven; 9 is a pair, 7 is alone; row 4 is empty


@contextmanager
def no_trap_warnings() -> Iterator[None]:
    """Warnings are errors in tests; here a trap is built on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrapWarning)
        yield


# Values for parameters that have no agreed default.
OPEN = {
    "max_length": 8,
    "m2_threshold": 0.04,
    "low_step": 0.05,
    "high_step": 0.1,
    "tau": 0.5,
    "opsm_delta": 0.1,
    "max_lag": 1,
    "threshold": 0.0,
    "keep": 2,
    "eta": 0.5,
}


def quiet_loss(name: str, **changes: Any) -> Loss:
    """get_loss without trap warnings, with values for parameters that have no default (the token limit among them)."""
    with no_trap_warnings():
        loss = get_loss(name, **changes)
        return loss.replace(**{key: OPEN[key] for key in loss.needs if key in OPEN})


def random_fields(seed: int = 0, drift: float = 0.3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Every field of a Batch but those that stand in for others, N = 9, T = 8, valid tokens anywhere in their row.

    drift: spread of the log-probabilities of the old policy, the sampler and the reference around the policy's.
    """
    draw = torch.Generator().manual_seed(seed)
    n, t = len(LENGTHS), 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    logp = -0.05 - 2 * torch.rand(n, t, generator=draw, dtype=torch.float64)

    def near() -> Tensor:
        return (logp + drift * normal(n, t)).clamp(max=-1e-3)

    mask = torch.stack([torch.rand(t, generator=draw).argsort().argsort() < length for length in LENGTHS])
    fields = {
        "logp": logp,
        "mask": mask,
        "old_logp": near(),
        "behavior_logp": near(),
        "ref_logp": near(),
        "full_kl": normal(n, t).abs(),
        "reward": normal(n),
        "group": torch.tensor(GROUPS),
        "value": normal(n, t),
        "old_value": normal(n, t),
        "entropy": normal(n, t).abs(),
        "truncated": torch.tensor([i % 4 == 3 for i in range(n)]),
        "baseline": normal(n),
        "reward_greedy": normal(n),
        "reward_parts": normal(n, 2),
        "reference_reward": normal(n, 5),
        "sum_prob_sq": torch.rand(n, t, generator=draw, dtype=torch.float64),
        "potential": normal(n, t),
        "off_policy": torch.tensor([i % 3 == 1 for i in range(n)]),
        "lag": torch.arange(n) % 3,
        "mismatched_log_ratio": normal(n),
        "pair_probability": 0.5 + 0.5 * torch.sigmoid(normal(n)),
        "pair_weight": torch.sigmoid(normal(n)),
    }
    fields |= {
        "teacher_logp": near(),
        "vocab_logp": normal(n, t, 7).log_softmax(-1)[..., :5],
        "teacher_vocab_logp": normal(n, t, 7).log_softmax(-1)[..., :5],
    }
    given = {"advantage", "returns", "divergence"}  # each stands in for what a loss computes from other fields
    missing = {f.name for f in dataclasses.fields(Batch)} - set(fields) - given
    assert not missing, f"Batch has new fields; give random values for {missing} here, so that every test sees them"
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in fields.items()}


def evaluate(loss: PolicyLoss, fields: dict[str, Tensor]) -> tuple[LossOutput, dict[str, Tensor]]:
    """(output, gradient of each leaf) of the whole batch; a leaf that the loss does not use has gradient 0."""
    leaves, batch = make(fields)
    out = loss(batch)
    return out, gradients(out.loss, leaves)


def make(fields: dict[str, Tensor]) -> tuple[dict[str, Tensor], Batch]:
    """(leaves, batch): the fields that carry gradient are leaves of the graph."""
    leaves = {name: fields[name].detach().clone().requires_grad_() for name in LEAVES if name in fields}
    return leaves, Batch(**{**fields, **leaves})


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves, grads, leaves.values(), strict=True)
    return {name: torch.zeros_like(leaf) if grad is None else grad for name, grad, leaf in pairs}


def double(x: Any) -> Tensor:
    """A list as float64 (torch's default would round it to float32 first)."""
    return torch.tensor(x, dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal float64 numbers of this seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def single_tokens(ratios: list[float], advantage: float) -> dict[str, Tensor]:
    """One completion of one token for each ratio, all with this advantage."""
    r = double(ratios)
    old = torch.full((len(r), 1), -5.0, dtype=torch.float64)
    return {
        "logp": old + r.log()[:, None],
        "old_logp": old,
        "behavior_logp": old.clone(),
        "mask": torch.ones(len(r), 1, dtype=torch.bool),
        "advantage": torch.full((len(r),), advantage, dtype=torch.float64),
    }

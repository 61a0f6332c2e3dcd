"""A policy small enough to know everything about: three tokens, completions of two, logits that see the first token."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lossmith.losses import Batch, PolicyLoss

COMPLETIONS = torch.tensor(list(itertools.product(range(3), repeat=2)))  # [9, 2]
SIZE = 3 + 9  # logits of the first token, then of the second after each first


def policy(seed: int) -> Tensor:
    """Random logits, a leaf that wants a gradient. [12]"""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE, generator=draw, dtype=torch.float64).requires_grad_()


def states(theta: Tensor) -> Tensor:
    """Log-probabilities of all tokens at the two states of each completion. [9, 2, 3]"""
    first, second = theta[:3].log_softmax(0), theta[3:].view(3, 3).log_softmax(1)
    return torch.stack([first.expand(9, 3), second[COMPLETIONS[:, 0]]], dim=1)


def token_logp(theta: Tensor) -> Tensor:
    """[9, 2]"""
    return states(theta).gather(2, COMPLETIONS[:, :, None])[:, :, 0]


def probabilities(theta: Tensor) -> Tensor:
    """Of each completion, [9]."""
    return token_logp(theta).sum(1).exp()


def gradient(value: Tensor, theta: Tensor) -> Tensor:
    return torch.autograd.grad(value, theta)[0]


def expected_reward(theta: Tensor, reward: Tensor) -> Tensor:
    return (probabilities(theta) * reward).sum()


def sequence_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of the distributions of completions."""
    la, lb = token_logp(a).sum(1), token_logp(b).sum(1)
    return (la.exp() * (la - lb)).sum()


def state_kl(at: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_t E_{state ~ at}[KL(a(.|state) || b(.|state))]: how far one differentiates KL at sampled states."""
    la, lb = states(a), states(b)
    return (probabilities(at).detach()[:, None] * (la.exp() * (la - lb)).sum(2)).sum()


def full_kl(theta: Tensor, ref: Tensor) -> Tensor:
    """KL(theta || ref) over the vocabulary at each position, with gradient. [9, 2]"""
    la, lb = states(theta), states(ref).detach()
    return (la.exp() * (la - lb)).sum(2)


def expected_gradient(loss: PolicyLoss, theta: Tensor, fields: Callable[[int], dict]) -> Tensor:
    """E_y[∇ L(y)] with y ~ theta: what the gradient of one sampled completion is on average, exactly.

    fields: from a completion's index, what the batch of that one completion holds besides logp and mask.
    """
    logp, total = token_logp(theta), torch.zeros((), dtype=torch.float64)
    for y, p in enumerate(probabilities(theta).detach()):
        row = slice(y, y + 1)
        total = total + p * loss(Batch(logp[row], torch.ones(1, 2, dtype=torch.bool), **fields(y))).loss
    return gradient(total, theta)

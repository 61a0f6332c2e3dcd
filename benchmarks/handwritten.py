"""Losses as a person writes them into a training script: nothing checked, nothing shared, nothing configurable.

Each takes the fields of a batch by name and gives the scalar; `losses.py` holds the listings and Lossmith against them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Fields = Mapping[str, Tensor]


def reinforce(f: Fields) -> Tensor:
    mask = f["mask"]
    return -(f["advantage"][:, None] * f["logp"] * mask).sum() / mask.sum()


def grpo(f: Fields) -> Tensor:
    mask, logp, advantage = f["mask"], f["logp"], f["advantage"][:, None]
    ratio = (logp - f["old_logp"]).exp()
    policy = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    gap = f["ref_logp"] - logp
    per_token = policy + 0.04 * (gap.exp() - gap - 1)
    return ((per_token * mask).sum(1) / mask.sum(1)).mean()


def dr_grpo(f: Fields) -> Tensor:
    mask, advantage = f["mask"], f["advantage"][:, None]
    ratio = (f["logp"] - f["old_logp"]).exp()
    policy = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return (policy * mask).sum() / mask.numel()  # the token limit is the width of the batch here


def cispo(f: Fields) -> Tensor:
    mask, logp = f["mask"], f["logp"]
    weight = (logp.detach() - f["old_logp"]).exp().clamp(max=5.0)
    return -(weight * f["advantage"][:, None] * logp * mask).sum() / mask.sum()


def gspo(f: Fields) -> Tensor:
    mask, advantage = f["mask"], f["advantage"]
    ratio = (((f["logp"] - f["old_logp"]) * mask).sum(1) / mask.sum(1)).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantage).mean()


def sapo(f: Fields) -> Tensor:
    mask, advantage = f["mask"], f["advantage"][:, None]
    tau = torch.where(advantage > 0, 1.0, 1.05)
    ratio = (f["logp"] - f["old_logp"]).exp()
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    return -((gate * advantage * mask).sum(1) / mask.sum(1)).mean()


def online_dpo(f: Fields) -> Tensor:
    reward = f["reward"].view(-1, 8)  # groups of eight stand together
    total = ((f["logp"] - f["ref_logp"]) * f["mask"]).sum(1).view(-1, 8)
    best, worst = reward.argmax(1, keepdim=True), reward.argmin(1, keepdim=True)
    return -F.logsigmoid(0.1 * (total.gather(1, best) - total.gather(1, worst))).mean()


HANDWRITTEN: dict[str, Callable[[Fields], Tensor]] = {
    f.__name__: f for f in (reinforce, grpo, dr_grpo, cispo, gspo, sapo, online_dpo)
}

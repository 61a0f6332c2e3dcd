"""A number for each token: returns, temporal differences, and what lies between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.advantage.signal import Estimator, Signal
from lossmith.losses.piece import number, param

__all__ = [
    "GAE",
    "MC",
    "OTB",
    "TD",
    "VAPO",
    "Critic",
    "ReMax",
    "Return",
]


@dataclass(frozen=True)
class Return(Estimator):
    """A_t = Σ_{k>=t} gamma^(k-t) r_k, the reward-to-go (book eq. 4.26; REINFORCE++, arXiv:2501.03262)."""

    option: ClassVar[str] = "return"
    needs: ClassVar[frozenset[str]] = frozenset({"reward"})
    per_token: ClassVar[bool] = True
    gamma: float = param("gamma", 1.0, "discount per token", low=0, high=1)

    def __call__(self, signal: Signal) -> Tensor:
        return discounted(signal.per_token, signal.batch.valid, self.gamma)

    def formula(self) -> str:
        g = "" if self.gamma == 1 else f"{number(self.gamma)}^(k − t)·"
        return f"Σ_{{k≥t}} {g}r_k"

    def code(self) -> list[str]:
        return [*_code(self.gamma, 1.0, "torch.zeros_like(r_t)"), "A = adv"]


class Critic(Estimator):
    """Estimators that read values V_t; the value after the last valid token is 0 (book.md section 4, point 11)."""

    needs: ClassVar[frozenset[str]] = frozenset({"reward", "value"})
    looks_at: ClassVar[frozenset[str]] = frozenset({"old_value"})
    critic: ClassVar[bool] = True
    homogeneous: ClassVar[bool] = False
    per_token: ClassVar[bool] = True

    def target(self, signal: Signal, advantage: Tensor) -> Tensor:
        return advantage + signal.values(f"advantage='{self.option}'")

    def target_formula(self) -> str:
        return "A + V"

    def target_code(self) -> list[str]:
        return ["G = adv + old_value"]


@dataclass(frozen=True)
class TD(Critic):
    """A_t = r_t + gamma V_{t+1} - V_t, the temporal-difference error (book eq. 4.31)."""

    option: ClassVar[str] = "td"
    gamma: float = param("gamma", 1.0, "discount per token", low=0, high=1)

    def __call__(self, signal: Signal) -> Tensor:
        return gae(signal.per_token, signal.values("advantage='td'"), signal.batch.valid, self.gamma, 0.0)

    def formula(self) -> str:
        g = "" if self.gamma == 1 else f"{number(self.gamma)}·"
        return f"r_t + {g}V_{{t+1}} − V_t"

    def code(self) -> list[str]:
        return [*_code(self.gamma, 0.0, "V"), "A = adv"]


@dataclass(frozen=True)
class MC(Critic):
    """A_t = Σ_{k>=t} r_k - V_t (book eq. 4.27; A2C)."""

    option: ClassVar[str] = "mc"

    def __call__(self, signal: Signal) -> Tensor:
        return gae(signal.per_token, signal.values("advantage='mc'"), signal.batch.valid, 1.0, 1.0)

    def formula(self) -> str:
        return "Σ_{k≥t} r_k − V_t"

    def code(self) -> list[str]:
        return [*_code(1.0, 1.0, "V"), "A = adv"]


@dataclass(frozen=True)
class GAE(Critic):
    """A_t = δ_t + gamma lam A_{t+1}, δ_t = r_t + gamma V_{t+1} - V_t (arXiv:1506.02438, eq. 16)."""

    option: ClassVar[str] = "gae"
    gamma: float = param("gamma", 1.0, "discount per token", low=0, high=1)
    lam: float = param("lam", 1.0, "bias-variance knob: 0 is 'td', 1 (with gamma 1) is 'mc'", low=0, high=1)

    def __call__(self, signal: Signal) -> Tensor:
        return gae(signal.per_token, signal.values("advantage='gae'"), signal.batch.valid, self.gamma, self.lam)

    def formula(self) -> str:
        g, gl = ("" if x == 1 else number(x) + "·" for x in (self.gamma, self.gamma * self.lam))
        return f"δ_t + {gl}A_{{t+1}} where δ_t = r_t + {g}V_{{t+1}} − V_t"

    def code(self) -> list[str]:
        return [*_code(self.gamma, self.lam, "V"), "A = adv"]


@dataclass(frozen=True)
class VAPO(Critic):
    """GAE with lam = 1 - 1/(alpha·T) >= 0 for the policy and 1 for the critic's target (VAPO, arXiv:2504.05118)."""

    option: ClassVar[str] = "vapo"
    alpha: float = param("alpha", 0.05, "lam is 1 - 1/(alpha·T) for a completion of T tokens", above=0)

    def __call__(self, signal: Signal) -> Tensor:
        lengths = signal.batch.lengths.clamp(min=1).to(signal.per_token.dtype)
        lam = (1 - 1 / (self.alpha * lengths)).clamp(min=0)
        return gae(signal.per_token, signal.values("advantage='vapo'"), signal.batch.valid, 1.0, lam)

    def target(self, signal: Signal, advantage: Tensor) -> Tensor:
        return discounted(signal.per_token, signal.batch.valid, 1.0)

    def target_formula(self) -> str:
        return "Σ_{k≥t} r_k"

    def target_code(self) -> list[str]:
        return ["G = r_t.flip(1).cumsum(1).flip(1)"]

    def formula(self) -> str:
        least = f"max(1 − 1/({number(self.alpha)}·T), 0)"
        return f"δ_t + λ·A_{{t+1}} where δ_t = r_t + V_{{t+1}} − V_t; λ = {least}"

    def code(self) -> list[str]:
        return [f"lam = (1 - 1 / ({self.alpha} * T)).clamp(min=0)", *_code(1.0, "lam", "V"), "A = adv"]


@dataclass(frozen=True)
class ReMax(Estimator):
    """A_t = Σ_{k>=t} r_k - R(greedy completion of the same prompt) (ReMax, arXiv:2310.10505)."""

    option: ClassVar[str] = "remax"
    compared_to: ClassVar[str] = "the score of the greedy completion"
    homogeneous: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "reward_greedy"})
    per_token: ClassVar[bool] = True

    def __call__(self, signal: Signal) -> Tensor:
        greedy = signal.batch.require("reward_greedy", "advantage='remax'")
        return discounted(signal.per_token, signal.batch.valid, 1.0) - greedy[:, None]

    def baseline(self, signal: Signal) -> Tensor:
        return signal.batch.require("reward_greedy", "advantage='remax'")

    def formula(self) -> str:
        return "Σ_{k≥t} r_k − R_greedy"

    def code(self) -> list[str]:
        return [*_code(1.0, 1.0, "torch.zeros_like(r_t)"), "A = adv - reward_greedy[:, None]"]


@dataclass(frozen=True)
class OTB(Estimator):
    """A_t = G_t - Σ_g G_t W_t / (Σ_g W_t + eps), W_t = Σ_{j<=t} (1 - 2q_j + Σ_v q_j(v)²), the optimal token baseline.

    G_t is the reward-to-go, q the old policy's probability; sums over the group at the t-th token of each completion.
    """

    option: ClassVar[str] = "otb"
    reads_old: ClassVar[bool] = True
    compares: ClassVar[str] = "group"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group", "sum_prob_sq"})
    per_token: ClassVar[bool] = True
    coupling: ClassVar[str] = "group"
    eps: float = param("eps", 1e-8, "added to the denominator", above=0, high=1)

    def __call__(self, signal: Signal) -> Tensor:
        mask, batch = signal.batch.valid, signal.batch
        square = batch.require("sum_prob_sq", "advantage='otb'")
        energy = torch.where(mask, 1 - 2 * batch.old("advantage='otb'").exp() + square, torch.zeros_like(square))
        weight, to_go = energy.cumsum(1), discounted(signal.per_token, mask, 1.0)
        # aligned by the number of the token in its completion, so that padding on either side changes nothing
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        groups, there = signal.groups("advantage='otb'"), mask.gather(1, order)
        wide = torch.promote_types(weight.dtype, to_go.dtype)  # rewards may be wider than log-probabilities
        w, g = (torch.where(there, x.gather(1, order), 0.0).to(wide) for x in (weight, to_go))
        sums = torch.zeros(
            int(groups.index.max()) + 1 if len(mask) else 0, mask.shape[1], dtype=w.dtype, device=w.device
        )
        over, under = (sums.index_add(0, groups.index, x)[groups.index] for x in (g * w, w))
        return torch.zeros_like(g).scatter(1, order, torch.where(there, g - over / (under + self.eps), 0.0))

    def formula(self) -> str:
        baseline = f"(Σ_{{j∈g}} Q_{{j,t}}·W_{{j,t}}) / (Σ_{{j∈g}} W_{{j,t}} + {number(self.eps)})"
        energy = "W_t = Σ_{k≤t} (1 − 2·π_old(y_k) + Σ_v π_old(v)²)"
        return f"Q_t − {baseline} where Q_t = Σ_{{k≥t}} r_k; {energy}"

    def code(self) -> list[str]:
        return [
            *_code(1.0, 1.0, "torch.zeros_like(r_t)"),
            "W = ((1 - 2 * old_logp.exp() + sum_prob_sq) * mask).cumsum(1) * mask  # tokens stand at the left",
            "same = (group[:, None] == group).to(W.dtype)",
            f"A = (adv - same @ (adv * W) / (same @ W + {self.eps})) * mask",
        ]


def discounted(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Σ_{k>=t} gamma^(k-t) r_k over valid tokens; masked tokens are stepped over. [N, T] -> [N, T]."""
    if gamma == 1:
        return torch.where(mask, torch.where(mask, reward, 0.0).flip(1).cumsum(1).flip(1), 0.0)
    return gae(reward, torch.zeros_like(reward), mask, gamma, 1.0)


def gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> Tensor:
    """Generalized advantage estimation over valid tokens, [N, T]; masked ones are stepped over. lam may be [N]."""
    if not mask.numel():
        return torch.zeros_like(reward)
    steps = zip(
        *(x.T.contiguous().flip(0).unbind() for x in (reward, value, mask)), strict=True
    )  # the last token first
    decay, found = gamma * lam, list[Tensor]()
    running = next_value = torch.zeros_like(reward[:, 0])
    for r, v, valid in steps:
        running = torch.where(valid, r + gamma * next_value - v + decay * running, running)
        next_value = torch.where(valid, v, next_value)
        found.append(running)
    return torch.where(mask, torch.stack(found).flip(0).T, 0.0)


def _code(gamma: float, lam: float | str, value: str) -> list[str]:
    """Lines of plain torch that compute `adv` [N, T] by generalized advantage estimation from r_t [N, T]."""
    return [
        f"V = {value}" if value != "V" else "V = old_value",
        "adv, run, after = torch.zeros_like(r_t), torch.zeros_like(r_t[:, 0]), torch.zeros_like(r_t[:, 0])",
        "for t in reversed(range(mask.shape[1])):",
        f"    delta = r_t[:, t] + {gamma} * after - V[:, t]",
        f"    run = torch.where(mask[:, t], delta + {gamma} * {lam} * run, run)",
        "    after, adv[:, t] = torch.where(mask[:, t], V[:, t], after), run",
    ]

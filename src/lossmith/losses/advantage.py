"""Advantage: how a score becomes the number that multiplies a token. No gradient passes through here.

An estimator maps rewards to advantages [N, T]; a scale then divides them. Group statistics follow the group
numbers on the rows, never their positions, and see only completions with a valid token.
Singleton groups and constant groups give exactly 0 (losses.md conventions), whatever rounding says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.batch import Batch
from lossmith.losses.piece import Piece, number, options, param
from lossmith.losses.shaping import on_last_token

__all__ = [
    "ADVANTAGE",
    "GAE",
    "SCALE",
    "TD",
    "BatchMean",
    "BatchStd",
    "Estimator",
    "Group",
    "GroupStd",
    "GroupStdBiased",
    "LeaveOneOut",
    "LooStd",
    "MonteCarlo",
    "NoScale",
    "Raw",
    "Return",
    "Scale",
    "Whiten",
]


# -- groups ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Groups:
    """Statistics of R [N] within each prompt's group; `live` rows (with a valid token) only."""

    index: Tensor  # [N] group of each row, 0..K-1
    live: Tensor  # [N] bool
    reward: Tensor  # [N], 0 at rows that are not live

    @classmethod
    def of(cls, reward: Tensor, group: Tensor, live: Tensor) -> Groups:
        index = torch.unique(group, return_inverse=True)[1]
        return cls(index, live, torch.where(live, reward, torch.zeros_like(reward)))

    def total(self, x: Tensor) -> Tensor:
        """[N] -> [N]: the sum of x over the live rows of each row's group."""
        x = torch.where(self.live, x, torch.zeros_like(x))
        sums = torch.zeros(int(self.index.max()) + 1 if len(x) else 0, dtype=x.dtype, device=x.device)
        return sums.index_add(0, self.index, x)[self.index]

    @property
    def size(self) -> Tensor:
        return self.total(torch.ones_like(self.reward))

    @property
    def mean(self) -> Tensor:
        return self.total(self.reward) / self.size.clamp(min=1)

    def std(self, ddof: int = 1) -> Tensor:
        square = self.total((self.reward - self.mean) ** 2)
        return (square / (self.size - ddof).clamp(min=1)).sqrt()

    @property
    def constant(self) -> Tensor:
        """[N] bool: every live reward of the group is the same number (a group of one included)."""
        low = torch.full((int(self.index.max()) + 1 if len(self.index) else 0,), torch.inf, dtype=self.reward.dtype)
        low = low.to(self.reward.device)
        gone = torch.full_like(self.reward, torch.inf)
        smallest = low.scatter_reduce(0, self.index, torch.where(self.live, self.reward, gone), "amin")
        largest = (-low).scatter_reduce(0, self.index, torch.where(self.live, self.reward, -gone), "amax")
        return (largest <= smallest)[self.index]

    @property
    def singleton(self) -> Tensor:
        return self.size <= 1


# -- what an estimator sees -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Signal:
    """Shaped rewards with the KL penalty taken off, and what surrounds them."""

    batch: Batch
    reward: Tensor  # [N] or [N, T]

    @property
    def per_token(self) -> Tensor:
        """[N, T]; a sequence reward sits on the last valid token."""
        return self.reward if self.reward.ndim == 2 else on_last_token(self.reward, self.batch.valid)

    @property
    def per_sequence(self) -> Tensor:
        """[N]; token rewards are summed over valid tokens."""
        return self.reward if self.reward.ndim == 1 else self.reward.sum(1)

    @property
    def live(self) -> Tensor:
        return self.batch.valid.any(1)

    def groups(self, owner: str) -> Groups:
        return Groups.of(self.per_sequence, self.batch.require("group", owner), self.live)

    def everyone(self) -> Groups:
        """The whole batch as one group."""
        return Groups.of(self.per_sequence, torch.zeros_like(self.live, dtype=torch.int64), self.live)

    def values(self, owner: str) -> Tensor:
        """The critic's values at the start of the update, [N, T]."""
        old = self.batch.old_value if self.batch.old_value is not None else self.batch.require("value", owner)
        return old.detach()


class Estimator(Piece):
    """Rewards -> advantages [N, T]."""

    per_token: ClassVar[bool] = False  # may differ between the tokens of one completion
    coupling: ClassVar[str] = "sequence"

    def __call__(self, signal: Signal) -> Tensor:
        """[N, T]; what stands at masked positions does not matter."""
        return self.sequence(signal)[:, None].expand(signal.batch.valid.shape)

    def sequence(self, signal: Signal) -> Tensor:
        """[N], for estimators that give one number to a completion."""
        raise NotImplementedError

    def formula(self) -> tuple[str, str]:
        """(text, LaTeX) of the advantage in terms of R or r_t."""
        raise NotImplementedError


@dataclass(frozen=True)
class Raw(Estimator):
    """A = R: the book's utility of a completion, with no baseline (eq. 4.44 with A = r)."""

    option: ClassVar[str] = "raw"
    needs: ClassVar[frozenset[str]] = frozenset({"reward"})

    def sequence(self, signal: Signal) -> Tensor:
        return signal.per_sequence

    def formula(self) -> tuple[str, str]:
        return "R", "R"


@dataclass(frozen=True)
class BatchMean(Estimator):
    """A = R - mean over the batch (the constant baseline b of the book's eq. 4.25; Williams 1992)."""

    option: ClassVar[str] = "batch_mean"
    needs: ClassVar[frozenset[str]] = frozenset({"reward"})
    coupling: ClassVar[str] = "batch"

    def sequence(self, signal: Signal) -> Tensor:
        everyone = signal.everyone()
        centred = everyone.reward - everyone.mean
        return torch.where(everyone.constant, torch.zeros_like(centred), centred)

    def formula(self) -> tuple[str, str]:
        return "R − mean_batch(R)", r"R - \bar R_{\mathrm{batch}}"


@dataclass(frozen=True)
class Group(Estimator):
    """A = R - mean of the prompt's group (arXiv:2402.03300, 2503.20783)."""

    option: ClassVar[str] = "group"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})
    coupling: ClassVar[str] = "group"
    singleton: str = param("singleton", "zero", "A of a group of one: 0, or its raw reward", choices=("zero", "raw"))

    def sequence(self, signal: Signal) -> Tensor:
        groups = signal.groups("advantage='group'")
        centred = torch.where(groups.constant, torch.zeros_like(groups.reward), groups.reward - groups.mean)
        return torch.where(groups.singleton, groups.reward, centred) if self.singleton == "raw" else centred

    def formula(self) -> tuple[str, str]:
        if self.singleton == "raw":
            return "(R − mean_g(R); R in a group of one)", r"(R - \mu_g;\ R \text{ in a group of one})"
        return "R − mean_g(R)", r"R - \mu_g"


@dataclass(frozen=True)
class LeaveOneOut(Estimator):
    """A_i = R_i - mean of the group's other rewards = G/(G-1) (R_i - mean) (RLOO, arXiv:2402.14740, eq. 8)."""

    option: ClassVar[str] = "loo"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})
    coupling: ClassVar[str] = "group"

    def sequence(self, signal: Signal) -> Tensor:
        groups = signal.groups("advantage='loo'")
        scaled = groups.size / (groups.size - 1).clamp(min=1) * (groups.reward - groups.mean)
        return torch.where(groups.constant, torch.zeros_like(scaled), scaled)

    def formula(self) -> tuple[str, str]:
        return "R_i − mean_{j≠i}(R_j)", r"R_i - \tfrac{1}{G-1}\sum_{j\ne i} R_j"


@dataclass(frozen=True)
class Return(Estimator):
    """A_t = Σ_{k>=t} gamma^(k-t) r_k, the reward-to-go (book eq. 4.26; REINFORCE++, arXiv:2501.03262)."""

    option: ClassVar[str] = "return"
    needs: ClassVar[frozenset[str]] = frozenset({"reward"})
    per_token: ClassVar[bool] = True
    gamma: float = param("gamma", 1.0, "discount per token", low=0)

    def __call__(self, signal: Signal) -> Tensor:
        return discounted(signal.per_token, signal.batch.valid, self.gamma)

    def formula(self) -> tuple[str, str]:
        g, tex = ("", "") if self.gamma == 1 else (f"{number(self.gamma)}^(k−t)·", rf"{number(self.gamma)}^{{k-t}}")
        return f"Σ_{{k≥t}} {g}r_k", rf"\sum_{{k\ge t}} {tex} r_k"


class Critic(Estimator):
    """Estimators that read values V_t; the value after the last valid token is 0 (book.md section 4, point 11)."""

    needs: ClassVar[frozenset[str]] = frozenset({"reward", "value"})
    per_token: ClassVar[bool] = True


@dataclass(frozen=True)
class TD(Critic):
    """A_t = r_t + gamma V_{t+1} - V_t, the temporal-difference error (book eq. 4.31)."""

    option: ClassVar[str] = "td"
    gamma: float = param("gamma", 1.0, "discount per token", low=0)

    def __call__(self, signal: Signal) -> Tensor:
        return gae(signal.per_token, signal.values("advantage='td'"), signal.batch.valid, self.gamma, 0.0)

    def formula(self) -> tuple[str, str]:
        g = "" if self.gamma == 1 else number(self.gamma)
        return f"r_t + {g}V_{{t+1}} − V_t", f"r_t + {g}V_{{t+1}} - V_t"


@dataclass(frozen=True)
class MonteCarlo(Critic):
    """A_t = Σ_{k>=t} r_k - V_t (book eq. 4.27; A2C)."""

    option: ClassVar[str] = "mc"

    def __call__(self, signal: Signal) -> Tensor:
        return gae(signal.per_token, signal.values("advantage='mc'"), signal.batch.valid, 1.0, 1.0)

    def formula(self) -> tuple[str, str]:
        return "Σ_{k≥t} r_k − V_t", r"\sum_{k\ge t} r_k - V_t"


@dataclass(frozen=True)
class GAE(Critic):
    """A_t = δ_t + gamma lam A_{t+1}, δ_t = r_t + gamma V_{t+1} - V_t (arXiv:1506.02438, eq. 16)."""

    option: ClassVar[str] = "gae"
    gamma: float = param("gamma", 1.0, "discount per token", low=0)
    lam: float = param("lam", 1.0, "bias-variance knob: 0 is 'td', 1 (with gamma 1) is 'mc'", low=0)

    def __call__(self, signal: Signal) -> Tensor:
        return gae(signal.per_token, signal.values("advantage='gae'"), signal.batch.valid, self.gamma, self.lam)

    def formula(self) -> tuple[str, str]:
        g, gl = ("" if x == 1 else number(x) + "·" for x in (self.gamma, self.gamma * self.lam))
        text = f"δ_t + {gl}A_{{t+1}},  δ_t = r_t + {g}V_{{t+1}} − V_t"
        return text, rf"\delta_t + {gl}A_{{t+1}},\ \delta_t = r_t + {g}V_{{t+1}} - V_t".replace("·", "")


def discounted(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Σ_{k>=t} gamma^(k-t) r_k over valid tokens; masked tokens are stepped over. [N, T] -> [N, T]."""
    return gae(reward, torch.zeros_like(reward), mask, gamma, 1.0)


def gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation over valid tokens, all [N, T]; masked tokens are stepped over."""
    advantage = torch.zeros_like(reward)
    running, next_value = torch.zeros_like(reward[:, 0]), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        valid = mask[:, t]
        delta = reward[:, t] + gamma * next_value - value[:, t]
        running = torch.where(valid, delta + gamma * lam * running, running)
        next_value = torch.where(valid, value[:, t], next_value)
        advantage[:, t] = torch.where(valid, running, torch.zeros_like(running))
    return advantage


# -- scales ---------------------------------------------------------------------------------------------------------


class Scale(Piece):
    """What advantages [N, T] are divided by."""

    coupling: ClassVar[str] = "token"

    def __call__(self, advantage: Tensor, signal: Signal) -> Tensor:
        raise NotImplementedError

    def formula(self, text: str, latex: str) -> tuple[str, str]:
        """Wrap the estimator's (text, LaTeX)."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoScale(Scale):
    """A as the estimator gives it."""

    option: ClassVar[str] = "none"

    def __call__(self, advantage: Tensor, signal: Signal) -> Tensor:
        return advantage

    def formula(self, text: str, latex: str) -> tuple[str, str]:
        return text, latex


def _ones_where(degenerate: Tensor, std: Tensor, eps: float) -> Tensor:
    """Standard deviations that, with eps added, divide by exactly 1 where they mean nothing."""
    return torch.where(degenerate, torch.full_like(std, 1.0 - eps), std)


class _Std(Scale):
    """Division by a standard deviation of R, eps added to it."""

    symbol: ClassVar[tuple[str, str]]
    eps: float

    def std(self, signal: Signal) -> Tensor:
        """[N]"""
        raise NotImplementedError

    def __call__(self, advantage: Tensor, signal: Signal) -> Tensor:
        return advantage / (self.std(signal) + self.eps)[:, None]

    def formula(self, text: str, latex: str) -> tuple[str, str]:
        e = number(self.eps)
        return f"({text}) / ({self.symbol[0]} + {e})", rf"\frac{{{latex}}}{{{self.symbol[1]} + {e}}}"


@dataclass(frozen=True)
class GroupStd(_Std):
    """Divided by the group's unbiased standard deviation (ddof 1) plus eps. A group of one is left as it is."""

    option: ClassVar[str] = "group_std"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})
    coupling: ClassVar[str] = "group"
    symbol: ClassVar[tuple[str, str]] = ("std_g(R)", r"\sigma_g")
    eps: float = param("eps", 1e-6, "added to the standard deviation", above=0)

    def std(self, signal: Signal) -> Tensor:
        groups = signal.groups("advantage_scale='group_std'")
        return _ones_where(groups.singleton, groups.std(), self.eps)


@dataclass(frozen=True)
class GroupStdBiased(_Std):
    """Divided by the group's biased standard deviation (ddof 0) plus eps."""

    option: ClassVar[str] = "group_std_biased"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})
    coupling: ClassVar[str] = "group"
    symbol: ClassVar[tuple[str, str]] = ("std0_g(R)", r"\sigma^{0}_g")
    eps: float = param("eps", 1e-6, "added to the standard deviation", above=0)

    def std(self, signal: Signal) -> Tensor:
        groups = signal.groups("advantage_scale='group_std_biased'")
        return _ones_where(groups.singleton, groups.std(ddof=0), self.eps)


@dataclass(frozen=True)
class BatchStd(_Std):
    """Divided by the unbiased standard deviation of R over the batch plus eps (Lite-PPO, arXiv:2508.08221)."""

    option: ClassVar[str] = "batch_std"
    needs: ClassVar[frozenset[str]] = frozenset({"reward"})
    coupling: ClassVar[str] = "batch"
    symbol: ClassVar[tuple[str, str]] = ("std_batch(R)", r"\sigma_{\mathrm{batch}}")
    eps: float = param("eps", 1e-6, "added to the standard deviation", above=0)

    def std(self, signal: Signal) -> Tensor:
        return signal.everyone().std()


@dataclass(frozen=True)
class LooStd(_Std):
    """Divided by the unbiased standard deviation of the group's other rewards plus eps; a zero one leaves A."""

    option: ClassVar[str] = "loo_std"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})
    coupling: ClassVar[str] = "group"
    symbol: ClassVar[tuple[str, str]] = ("std_{j≠i}(R_j)", r"\sigma_{g\setminus i}")
    eps: float = param("eps", 1e-6, "added to the standard deviation", above=0)

    def std(self, signal: Signal) -> Tensor:
        g = signal.groups("advantage_scale='loo_std'")
        others = (g.size - 1).clamp(min=1)
        mean = (g.total(g.reward) - g.reward) / others
        # Σ_{j≠i} (R_j - mean_i)² = Σ_j (R_j - μ)² + G(μ - mean_i)² - (R_i - mean_i)²: no cancellation of large squares
        square = g.total((g.reward - g.mean) ** 2) + g.size * (g.mean - mean) ** 2 - (g.reward - mean) ** 2
        std = (square.clamp(min=0) / (others - 1).clamp(min=1)).sqrt()
        return _ones_where(std <= 1e-12 * (1 + g.reward.abs()), std, self.eps)


@dataclass(frozen=True)
class Whiten(Scale):
    """(A - mean) / sqrt(var + 1e-8) over all valid tokens, unbiased; fewer than two of them, or equal ones, give 0."""

    option: ClassVar[str] = "whiten"
    coupling: ClassVar[str] = "batch"

    def __call__(self, advantage: Tensor, signal: Signal) -> Tensor:
        mask = signal.batch.valid
        valid, count = advantage[mask], mask.sum()
        if count < 2 or valid.max() == valid.min():
            return torch.zeros_like(advantage)
        kept = torch.where(mask, advantage, torch.zeros_like(advantage))
        mean = kept.sum() / count
        centred = torch.where(mask, advantage - mean, torch.zeros_like(advantage))
        return centred * torch.rsqrt((centred**2).sum() / (count - 1) + 1e-8)

    def formula(self, text: str, latex: str) -> tuple[str, str]:
        return f"whiten_tokens({text})", rf"\operatorname{{whiten}}\left({latex}\right)"


ADVANTAGE = options(Raw, BatchMean, Group, LeaveOneOut, Return, TD, MonteCarlo, GAE)
SCALE = options(NoScale, GroupStd, GroupStdBiased, BatchStd, LooStd, Whiten)

"""One number a completion: the reward minus a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.as_tensor import wide
from lossmith.losses.axes.advantage.signal import Estimator, Groups, Signal
from lossmith.losses.axes.shaping import part_weights
from lossmith.losses.piece import number, param

__all__ = [
    "GDPO",
    "GFPO",
    "GPG",
    "LOO",
    "OPO",
    "Asymmetric",
    "Baseline",
    "BatchMean",
    "Given",
    "Group",
    "MaxRL",
    "NemoLOO",
    "Ones",
    "PassAtK",
    "Raw",
    "Zero",
]


@dataclass(frozen=True)
class Raw(Estimator):
    """A = R: the book's utility of a completion, with no baseline (eq. 4.44 with A = r)."""

    option: ClassVar[str] = "raw"
    needs: ClassVar[frozenset[str]] = frozenset({"reward"})

    def sequence(self, signal: Signal) -> Tensor:
        return signal.per_sequence

    def formula(self) -> str:
        return "R"

    def code(self) -> list[str]:
        return ["A = R"]


@dataclass(frozen=True)
class BatchMean(Estimator):
    """A = R - mean over the batch (the constant baseline b of the book's eq. 4.25; Williams 1992)."""

    option: ClassVar[str] = "batch_mean"
    compared_to: ClassVar[str] = "the mean of the update"
    needs: ClassVar[frozenset[str]] = frozenset({"reward"})
    coupling: ClassVar[str] = "batch"
    compares: ClassVar[str] = "batch"

    def sequence(self, signal: Signal) -> Tensor:
        everyone = signal.everyone()
        centered = everyone.reward - everyone.mean
        return torch.where(everyone.constant, torch.zeros_like(centered), centered)

    def formula(self) -> str:
        return "R − mean_batch(R)"

    def code(self) -> list[str]:
        return ["A = R - R.mean()"]


@dataclass(frozen=True)
class Asymmetric(Estimator):
    """A = R - (mean of the prompt's group + shift): with a shift below 0 good completions teach more than bad ones
    (AsymRE, arXiv:2506.20520). Where all rewards of a group are equal, A is -shift.
    """

    option: ClassVar[str] = "asymmetric"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})
    coupling: ClassVar[str] = "group"
    compares: ClassVar[str] = "group"
    compared_to: ClassVar[str] = "its group's mean, shifted"
    shift_invariant: ClassVar[bool] = True
    homogeneous: ClassVar[bool] = False
    shift: float = param("baseline_shift", -0.1, "added to the group's mean, in the reward's units")

    def sequence(self, signal: Signal) -> Tensor:
        groups = signal.groups("advantage='asymmetric'")
        centered = torch.where(groups.constant, torch.zeros_like(groups.reward), groups.reward - groups.mean)
        return centered - self.shift

    def formula(self) -> str:
        return f"R − (mean_g(R) {'−' if self.shift < 0 else '+'} {number(abs(self.shift))})"

    def code(self) -> list[str]:
        return [f"A = R - (mean_g(R) + {self.shift})"]


class _OverGroup(Estimator):
    """Estimators over a prompt's group, exactly 0 where its rewards are all equal."""

    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})
    coupling: ClassVar[str] = "group"
    compares: ClassVar[str] = "group"
    zero_alone: ClassVar[bool] = True

    def over(self, groups: Groups, signal: Signal) -> Tensor:
        """[N], where the group's rewards differ."""
        raise NotImplementedError

    def sequence(self, signal: Signal) -> Tensor:
        groups = signal.groups(f"advantage='{self.option}'")
        return torch.where(groups.constant, torch.zeros_like(groups.reward), self.over(groups, signal))


@dataclass(frozen=True)
class _Centered(_OverGroup):
    """Reward minus a baseline of its group; a group of one, which has none, gets 0 or its raw reward."""

    singleton: str = param("singleton", "zero", "A of a group of one: 0, or its raw reward", choices=("zero", "raw"))

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return self.singleton == "zero"

    @property
    def zero_alone(self) -> bool:  # type: ignore[override]
        return self.singleton == "zero"

    @property
    def compares(self) -> str:  # type: ignore[override]
        return "group" if self.singleton == "zero" else ""

    @property
    def homogeneous(self) -> bool:  # type: ignore[override]
        return self.singleton == "zero"  # a scale leaves a group of one as it is

    def alone(self, groups: Groups) -> Tensor:
        """[N], what a group of one gets if not 0."""
        return groups.reward

    def sequence(self, signal: Signal) -> Tensor:
        centered = super().sequence(signal)
        if self.singleton == "zero":
            return centered
        groups = signal.groups(f"advantage='{self.option}'")
        return torch.where(groups.singleton, self.alone(groups), centered)

    def with_alone(self, text: str, raw: str = "R") -> str:
        """A formula over the group, and what a group of one gets where that is not 0."""
        return text if self.singleton == "zero" else f"{raw} if |g| = 1 else {text}"

    def alone_code(self, raw: str = "R") -> list[str]:
        """The line of the listing for a group of one."""
        return [] if self.singleton == "zero" else [f"A = torch.where(size_g() == 1, {raw}, A)"]


@dataclass(frozen=True)
class Group(_Centered):
    """A = R - mean of the prompt's group (arXiv:2402.03300, 2503.20783)."""

    option: ClassVar[str] = "group"
    compared_to: ClassVar[str] = "its group's mean"

    def over(self, groups: Groups, signal: Signal) -> Tensor:
        return groups.reward - groups.mean

    def formula(self) -> str:
        return self.with_alone("R − mean_g(R)")

    def code(self) -> list[str]:
        return ["A = R - mean_g(R)", *self.alone_code()]


@dataclass(frozen=True)
class LOO(_OverGroup):
    """A_i = R_i - mean of the group's other rewards = G/(G-1) (R_i - mean) (RLOO, arXiv:2402.14740, eq. 8)."""

    option: ClassVar[str] = "loo"
    compared_to: ClassVar[str] = "the mean of the others of its group"
    shift_invariant: ClassVar[bool] = True

    def over(self, groups: Groups, signal: Signal) -> Tensor:
        return groups.without_itself

    def formula(self) -> str:
        return "R_i − mean_{j≠i}(R_j)"

    def code(self) -> list[str]:
        return ["A = size_g() / (size_g() - 1).clamp(min=1) * (R - mean_g(R))"]


@dataclass(frozen=True)
class Given(Estimator):
    """A = Batch.advantage; nothing is estimated."""

    option: ClassVar[str] = "given"
    scalable: ClassVar[bool] = False
    homogeneous: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"advantage"})

    def sequence(self, signal: Signal) -> Tensor:
        signal.batch.require("advantage", "advantage='given'")  # given: no estimator is asked
        raise AssertionError

    def formula(self) -> str:
        return "as given"

    def code(self) -> list[str]:
        return ["A = advantage"]


@dataclass(frozen=True)
class Ones(Estimator):
    """A = 1 everywhere: imitation of whatever completions take part."""

    option: ClassVar[str] = "ones"
    homogeneous: ClassVar[bool] = False

    def sequence(self, signal: Signal) -> Tensor:
        return torch.ones_like(signal.per_sequence)

    def formula(self) -> str:
        return "1"

    def code(self) -> list[str]:
        return ["A = torch.ones(len(mask), dtype=logp.dtype)"]


@dataclass(frozen=True)
class Zero(Estimator):
    """A = 0 everywhere: no policy term, the other terms alone."""

    option: ClassVar[str] = "zero"
    acts: ClassVar[bool] = False
    scalable: ClassVar[bool] = False
    homogeneous: ClassVar[bool] = False

    def sequence(self, signal: Signal) -> Tensor:
        return torch.zeros_like(signal.per_sequence)

    def formula(self) -> str:
        return "0"

    def code(self) -> list[str]:
        return ["A = torch.zeros(mask.shape, dtype=torch.float64)"]


@dataclass(frozen=True)
class Baseline(Estimator):
    """A = R - b with b given for each completion: the mean reward of its role so far (RAE, arXiv:2506.24119), say."""

    option: ClassVar[str] = "baseline"
    compared_to: ClassVar[str] = "the given baseline"
    homogeneous: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "baseline"})

    def sequence(self, signal: Signal) -> Tensor:
        return signal.per_sequence - signal.batch.require("baseline", "advantage='baseline'")

    def formula(self) -> str:
        return "R − b"

    def code(self) -> list[str]:
        return ["A = R - baseline"]


@dataclass(frozen=True)
class NemoLOO(_OverGroup):
    """Leave-one-out, divided by the standard deviation of the others only where that is above 0 (NeMo-RL's "grpo").

    Of rewards [1, 0, 0, 0] the winner gets 1 and is not scaled, the losers -0.577: the group's sum is not 0.
    """

    option: ClassVar[str] = "nemo_loo"
    shift_invariant: ClassVar[bool] = True

    def over(self, groups: Groups, signal: Signal) -> Tensor:
        std, centered = groups.std_of_others(), groups.without_itself
        return torch.where(std > 0, centered / torch.where(std > 0, std, torch.ones_like(std)), centered)

    def formula(self) -> str:
        return "(R_i − mean_{j≠i}(R_j)) / (s if s > 0 else 1) where s = std_{j≠i}(R_j)"

    def code(self) -> list[str]:
        return [
            "A, std = size_g() / (size_g() - 1).clamp(min=1) * (R - mean_g(R)), std_of_others()",
            "A = torch.where(std > 1e-12, A / std.clamp(min=1e-12), A)",
        ]


@dataclass(frozen=True)
class OPO(_Centered):
    """A = R - Σ_g T_j R_j / Σ_g T_j, the group's mean weighted by length (OPO, arXiv:2505.23585)."""

    option: ClassVar[str] = "opo"
    compared_to: ClassVar[str] = "its group's mean, weighted by length,"

    def over(self, groups: Groups, signal: Signal) -> Tensor:
        lengths = signal.batch.lengths.to(groups.reward.dtype)
        return groups.reward - groups.total(lengths * groups.reward) / groups.total(lengths).clamp(min=1)

    def formula(self) -> str:
        return self.with_alone("R − (Σ_{j∈g} T_j·R_j) / (Σ_{j∈g} T_j)")

    def code(self) -> list[str]:
        return ["A = R - sum_g(T * R) / sum_g(T)", *self.alone_code()]


@dataclass(frozen=True)
class GPG(_Centered):
    """A = α(R - mean of the group), α = completions / completions with R ≠ 0 in the batch (GPG, arXiv:2504.02546)."""

    option: ClassVar[str] = "gpg"
    coupling: ClassVar[str] = "batch"
    shift_invariant: ClassVar[bool] = False  # α counts the rewards that are 0

    def over(self, groups: Groups, signal: Signal) -> Tensor:
        return self._alpha(groups) * (groups.reward - groups.mean)

    def alone(self, groups: Groups) -> Tensor:
        return self._alpha(groups) * groups.reward

    def _alpha(self, groups: Groups) -> Tensor:
        counted = ((groups.reward != 0) & groups.live).sum().clamp(min=1)
        return groups.live.sum().to(groups.reward.dtype) / counted

    def formula(self) -> str:
        return f"({self.with_alone('R − mean_g(R)')}) / mean_batch([R ≠ 0])"

    def code(self) -> list[str]:
        alpha = "alpha = len(R) / (R != 0).sum().clamp(min=1)"
        return [alpha, "A = alpha * (R - mean_g(R))", *self.alone_code("alpha * R")]


@dataclass(frozen=True)
class PassAtK(_OverGroup):
    """Only the best completion of a group counts: A = R_max - R_2nd, the others 0 (pass@k, arXiv:2503.19595)."""

    option: ClassVar[str] = "pass_at_k"
    shift_invariant: ClassVar[bool] = True

    def over(self, groups: Groups, signal: Signal) -> Tensor:
        best = groups.first_where(groups.reward == groups.largest)
        rest = Groups(groups.index, groups.live & ~best, groups.reward)
        return torch.where(best, groups.reward - rest.largest, torch.zeros_like(groups.reward))

    def formula(self) -> str:
        return "[R = max_g(R)]·(R − second_g(R))"

    def code(self) -> list[str]:
        return [
            "best = R == max_g(R)",
            "second = torch.where(sum_g(best.to(R.dtype)) > 1, max_g(R), max_g(torch.where(best, -torch.inf, R)))",
            "A = torch.where(best & (size_g() > 1), R - second, 0.0)",
        ]


@dataclass(frozen=True)
class MaxRL(_OverGroup):
    """A = (R - mean)/(mean + eps), 0 where the group's mean is not above 0 (MaxRL, arXiv:2602.02710)."""

    option: ClassVar[str] = "maxrl"
    scale_invariant: ClassVar[bool] = True
    eps: float = param("eps", 1e-6, "added to the denominator", above=0, high=1)

    def over(self, groups: Groups, signal: Signal) -> Tensor:
        mean = groups.mean
        return torch.where(mean > 0, (groups.reward - mean) / (mean.clamp(min=0) + self.eps), torch.zeros_like(mean))

    def formula(self) -> str:
        return f"(R − mean_g(R)) / (mean_g(R) + {number(self.eps)}) if mean_g(R) > 0 else 0"

    def code(self) -> list[str]:
        return [f"A = torch.where(mean_g(R) > 0, (R - mean_g(R)) / (mean_g(R) + {self.eps}), 0.0)"]


@dataclass(frozen=True)
class GFPO(_OverGroup):
    """(R - mean)/(std + eps) over the `keep` best of each group by a metric, the rest 0 (GFPO, arXiv:2508.09726).

    metric "length": the shortest; "efficiency": the highest reward per token. Ties: the first.
    """

    option: ClassVar[str] = "gfpo"
    shift_invariant: ClassVar[bool] = False  # efficiency moves with the reward
    keep: int | None = param("keep", None, "completions of a group that are kept", low=2, required=True)
    metric: str = param("metric", "length", "what they are chosen by", choices=("length", "efficiency"))
    eps: float = param("eps", 1e-6, "added to the standard deviation", above=0, high=1)

    def over(self, groups: Groups, signal: Signal) -> Tensor:
        lengths = signal.batch.lengths.to(groups.reward.dtype)
        key = lengths if self.metric == "length" else -groups.reward / lengths.clamp(min=1)
        chosen, left = torch.zeros_like(groups.live), groups.live
        for _ in range(min(self.given("keep"), len(key))):
            rest = Groups(groups.index, left, -key)
            first = rest.first_where(-key == rest.largest)
            chosen, left = chosen | first, left & ~first
        kept = Groups.of(groups.reward, groups.index, chosen)
        score = (groups.reward - kept.mean) / (kept.std() + self.eps)
        return torch.where(chosen & ~kept.constant, score, torch.zeros_like(score))

    def formula(self) -> str:
        by = "T" if self.metric == "length" else "−R/T"
        chosen = f"lowest_g({self.keep or 'n'}, {by})"
        return f"(R − mean_S(R)) / (std_S(R) + {number(self.eps)}) if i ∈ S else 0 where S = {chosen}"

    def code(self) -> list[str]:
        return [
            f"key = {'T.to(R.dtype)' if self.metric == 'length' else '-R / T'}",
            "same = group[:, None] == group",
            "place = torch.arange(len(R))",
            "ahead = same & ((key < key[:, None]) | ((key == key[:, None]) & (place < place[:, None])))",
            f"S = ahead.sum(1) < {self.keep}",
            "inside = (same & S).to(R.dtype)",
            "mean = inside @ R / inside.sum(1)",
            "std = ((inside @ R**2 - inside.sum(1) * mean**2).clamp(min=0) / (inside.sum(1) - 1).clamp(min=1)).sqrt()",
            f"A = torch.where(S, (R - mean) / (std + {self.eps}), 0.0)",
        ]


@dataclass(frozen=True)
class GDPO(_OverGroup):
    """Each score normalized within its group, their weighted sum normalized over the batch (GDPO, arXiv:2601.05242)."""

    option: ClassVar[str] = "gdpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reward_parts", "group"})
    coupling: ClassVar[str] = "batch"
    zero_alone: ClassVar[bool] = False  # the batch's mean is taken off it
    shift_invariant: ClassVar[bool] = True
    scale_invariant: ClassVar[bool] = True
    weights: tuple[float, ...] = param("score_weights", (), "weight of each score; all 1 if not given")
    eps: float = param("eps", 1e-6, "added to the standard deviations", above=0, high=1)

    def sequence(self, signal: Signal) -> Tensor:
        parts = wide(signal.batch.require("reward_parts", "advantage='gdpo'"))
        weights = part_weights(self.weights, parts)
        total = torch.zeros_like(parts[:, 0])
        for k, weight in enumerate(weights):
            groups = Groups.of(parts[:, k], signal.batch.require("group", "advantage='gdpo'"), signal.live)
            score = (groups.reward - groups.mean) / (groups.std() + self.eps)
            total = total + weight * torch.where(groups.constant, torch.zeros_like(score), score)
        batch = Groups.of(total, torch.zeros_like(signal.live, dtype=torch.int64), signal.live)
        score = (batch.reward - batch.mean) / (batch.std() + self.eps)
        return torch.where(batch.constant, torch.zeros_like(score), score)

    def formula(self) -> str:
        e, w = number(self.eps), "w_k·" if self.weights else ""
        score = f"Σ_k {w}(R_k − mean_g(R_k)) / (std_g(R_k) + {e})"
        weights = f"; w = ({', '.join(map(number, self.weights))})" if self.weights else ""
        return f"(z − mean_batch(z)) / (std_batch(z) + {e}) where z = {score}{weights}"

    def code(self) -> list[str]:
        weights = "torch.ones(reward_parts.shape[1])" if not self.weights else f"torch.tensor({list(self.weights)})"
        return [
            f"w = {weights}",
            f"scores = [(x - mean_g(x)) / (std_g(x) + {self.eps}) for x in reward_parts.T]",
            "total = sum(w[k] * scores[k] for k in range(len(w)))",
            f"A = (total - total.mean()) / (total.std() + {self.eps})",
        ]

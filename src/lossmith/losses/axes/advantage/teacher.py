"""Advantages that follow a teacher at the sampled token: distillation by policy gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.advantage.scale import GroupStd
from lossmith.losses.axes.advantage.signal import Estimator, Signal
from lossmith.losses.piece import number, param

__all__ = ["EarlyTeacherGap", "ReferenceGap", "TeacherGap", "TeacherMix", "TeacherReweighted"]


@dataclass(frozen=True)
class ReferenceGap(Estimator):
    """A_t = log π_ref - log π_old: the reverse KL to the reference by policy gradient."""

    option: ClassVar[str] = "reference_gap"
    reads_old: ClassVar[bool] = True
    homogeneous: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logp"})
    per_token: ClassVar[bool] = True

    def __call__(self, signal: Signal) -> Tensor:
        ref = signal.batch.require("ref_logp", "advantage='reference_gap'").detach()
        return ref - signal.batch.old("advantage='reference_gap'")

    def formula(self) -> str:
        return "log π_ref(y_t) − log π_old(y_t)"

    def code(self) -> list[str]:
        return ["A = ref_logp - old_logp"]


class _Teacher(Estimator):
    """Reads the teacher's log-probability of each sampled token."""

    reads_old: ClassVar[bool] = True
    homogeneous: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logp"})
    per_token: ClassVar[bool] = True

    def gap(self, signal: Signal) -> Tensor:
        """log π_T - log π_old, [N, T]."""
        owner = f"advantage='{self.option}'"
        return signal.batch.require("teacher_logp", owner).detach() - signal.batch.old(owner)


_GAP = "log π_T(y_t) − log π_old(y_t)"


@dataclass(frozen=True)
class TeacherGap(_Teacher):
    """A_t = log π_T - log π_old: the reverse KL to the teacher by policy gradient (on-policy distillation)."""

    option: ClassVar[str] = "teacher_gap"

    def __call__(self, signal: Signal) -> Tensor:
        return self.gap(signal)

    def formula(self) -> str:
        return _GAP

    def code(self) -> list[str]:
        return ["A = teacher_logp - old_logp"]


@dataclass(frozen=True)
class EarlyTeacherGap(_Teacher):
    """A_t = (1 + early·(1 - Σ_{k<t}|a_k| / Σ_k|a_k|))·a_t, a_t = log π_T - log π_old: what comes before the policy has
    left the teacher counts more (IW-OPD, arXiv:2606.22600, as TRL 1.16.0 computes it).
    """

    option: ClassVar[str] = "early_teacher_gap"
    coupling: ClassVar[str] = "sequence"
    early: float = param("early", 0.5, "how much more the first token counts than the last", low=0)
    eps: float = param("early_eps", 1e-8, "least sum of |a| that is divided by", above=0)

    def __call__(self, signal: Signal) -> Tensor:
        gap = self.gap(signal)
        size = torch.where(signal.batch.valid, gap.abs(), torch.zeros_like(gap))
        before = size.cumsum(1) - size
        return (1 + self.early * (1 - before / size.sum(1, keepdim=True).clamp(min=self.eps))) * gap

    def formula(self) -> str:
        g, e = number(self.early), number(self.eps)
        return f"(1 + {g}·(1 − Σ_{{k<t}} |a_k| / max(Σ_t |a_t|, {e})))·a_t where a_t = {_GAP}"

    def code(self) -> list[str]:
        return [
            "gap = (teacher_logp - old_logp) * mask",
            "before = gap.abs().cumsum(1) - gap.abs()  # tokens stand at the left",
            f"A = (1 + {self.early} * (1 - before / gap.abs().sum(1, keepdim=True).clamp(min={self.eps}))) * gap",
        ]


@dataclass(frozen=True)
class TeacherMix(_Teacher):
    """A_t = share·(R - mean_g)/(std_g + eps) + (1 - share)·(log π_T - log π_old): GRPO's advantage and the teacher's
    in one (SDPO, arXiv:2601.20802).
    """

    option: ClassVar[str] = "teacher_mix"
    scalable: ClassVar[bool] = False
    coupling: ClassVar[str] = "group"
    compares: ClassVar[str] = "group"
    shift_invariant: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logp", "reward", "group"})
    share: float = param("reward_share", 0.9, "share of the advantage from rewards", low=0, high=1)
    eps: float = param("eps", 1e-6, "added to the standard deviation", above=0, high=1)

    def __call__(self, signal: Signal) -> Tensor:
        return self.share * _group_advantage(signal, self.eps)[:, None] + (1 - self.share) * self.gap(signal)

    def formula(self) -> str:
        s, rest, e = number(self.share), number(1 - self.share), number(self.eps)
        return f"{s}·(R − mean_g(R)) / (std_g(R) + {e}) + {rest}·({_GAP})"

    def code(self) -> list[str]:
        return [
            *_group_code(self.eps),
            f"A = {self.share} * A[:, None] + (1 - {self.share}) * (teacher_logp - old_logp)",
        ]


@dataclass(frozen=True)
class TeacherReweighted(_Teacher):
    """A_t = A·(1 - share + share·clip(e^(sign(A)·d_t), 1 - bound, 1 + bound)), d_t = log π_T - log π_old, A GRPO's: the
    teacher moves credit between tokens and never turns its sign (RLSD, arXiv:2604.03128, as ms-swift 4.6.0).
    """

    option: ClassVar[str] = "teacher_reweighted"
    scalable: ClassVar[bool] = False
    coupling: ClassVar[str] = "group"
    compares: ClassVar[str] = "group"
    shift_invariant: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logp", "reward", "group"})
    share: float = param("teacher_share", 0.5, "share of the weight that follows the teacher", low=0, high=1)
    bound: float = param("teacher_bound", 0.2, "the weight stays within 1 - bound and 1 + bound", above=0, high=1)
    eps: float = param("eps", 1e-6, "added to the standard deviation", above=0, high=1)

    def __call__(self, signal: Signal) -> Tensor:
        advantage = _group_advantage(signal, self.eps)[:, None]
        # clipped before the exponential: far from the teacher it would overflow
        tilt = (advantage.sign() * self.gap(signal)).clamp(-20, 20).exp().clamp(1 - self.bound, 1 + self.bound)
        return advantage * (1 - self.share + self.share * tilt)

    def formula(self) -> str:
        rest, s, low, high = (number(x) for x in (1 - self.share, self.share, 1 - self.bound, 1 + self.bound))
        tilt = f"clip(e^(sign(B)·({_GAP})), {low}, {high})"
        return f"B·({rest} + {s}·{tilt}) where B = (R − mean_g(R)) / (std_g(R) + {number(self.eps)})"

    def code(self) -> list[str]:
        return [
            *_group_code(self.eps),
            "tilt = torch.exp(A.sign()[:, None] * (teacher_logp - old_logp))",
            f"tilt = tilt.clamp(1 - {self.bound}, 1 + {self.bound})",
            f"A = A[:, None] * (1 - {self.share} + {self.share} * tilt)",
        ]


def _group_advantage(signal: Signal, eps: float) -> Tensor:
    """GRPO's advantage [N]: 0 in groups of one and of equal rewards."""
    groups = signal.groups("a teacher's advantage")
    centered = torch.where(groups.constant, torch.zeros_like(groups.reward), groups.reward - groups.mean)
    return centered / (GroupStd(eps).std(signal) + eps)


def _group_code(eps: float) -> list[str]:
    return ["std = std_g(R)", f"A = (R - mean_g(R)) / torch.where(std == 0, 1.0, std + {eps})"]

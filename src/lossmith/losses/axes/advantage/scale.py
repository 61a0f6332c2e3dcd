"""What advantages are divided by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.advantage.signal import Signal, unit_of
from lossmith.losses.piece import Piece, number, options, param, pieces_in

__all__ = ["SCALE", "BatchStd", "GroupStd", "GroupStdBiased", "LOOStd", "NoScale", "Scale", "Whiten"]


class Scale(Piece):
    """What advantages [N, T] are divided by."""

    divided_by: ClassVar[str] = "what scales it"  # in words
    shifted_by: ClassVar[str] = ""
    per_token: ClassVar[bool] = False  # may divide advantages that differ between the tokens of a completion
    shift_invariant: ClassVar[bool] = True  # R + c within each group leaves the divisor as it is
    scale_invariant: ClassVar[bool] = True  # c·R with c > 0 multiplies the divisor by c (but for eps)

    def __call__(self, advantage: Tensor, signal: Signal) -> Tensor:
        raise NotImplementedError

    def parts(self, advantage: Tensor, signal: Signal) -> tuple[Tensor, Tensor]:
        """(shift, divisor), to be broadcast to [N, T]: what it gives is (A - shift)/divisor."""
        scaled = self(advantage, signal)
        seen = scaled != 0
        divisor = torch.where(seen, advantage / torch.where(seen, scaled, 1.0), torch.ones_like(scaled))
        return torch.zeros_like(scaled), divisor

    def formula(self, text: str, zero_alone: bool) -> str:
        """Wrap the estimator's text. zero_alone: its advantage of a group of one is 0, whatever divides it."""
        raise NotImplementedError

    def code(self) -> list[str]:
        """Lines of plain torch that scale `A` [N] or [N, T]."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoScale(Scale):
    """A as the estimator gives it.

    eps is accepted, so that a scale can be switched off without taking its parameter away; it is not part of the loss.
    """

    option: ClassVar[str] = "none"
    acts: ClassVar[bool] = False
    per_token: ClassVar[bool] = True
    scale_invariant: ClassVar[bool] = False
    eps: float = param("eps", 1e-6, "added to the standard deviation; of no effect without a scale", above=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "eps", 1e-6)

    def flat(self) -> dict[str, Any]:
        return {}

    def __call__(self, advantage: Tensor, signal: Signal) -> Tensor:
        return advantage

    def formula(self, text: str, zero_alone: bool) -> str:
        return text

    def code(self) -> list[str]:
        return []


def _ones_where(degenerate: Tensor, std: Tensor, eps: float) -> Tensor:
    """Standard deviations that, with eps added, divide by exactly 1 where they mean nothing."""
    return torch.where(degenerate, torch.full_like(std, 1.0 - eps), std)


_ALONE = "|g| = 1"


class _Std(Scale):
    """Division by a standard deviation of R, eps added to it."""

    symbol: ClassVar[str]
    one_where: ClassVar[str | None] = None  # the condition, as a formula has it, under which A is left as it is
    eps: float

    def std(self, signal: Signal) -> Tensor:
        """[N]"""
        raise NotImplementedError

    def __call__(self, advantage: Tensor, signal: Signal) -> Tensor:
        return advantage / self.parts(advantage, signal)[1]

    def parts(self, advantage: Tensor, signal: Signal) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(advantage), (self.std(signal) + self.eps)[:, None]

    def formula(self, text: str, zero_alone: bool) -> str:
        divisor = f"{self.symbol} + {number(self.eps)}"
        if self.one_where is None or (zero_alone and self.one_where == _ALONE):
            return f"({text}) / ({divisor})"
        return f"({text}) / s where s = 1 if {self.one_where} else {divisor}"

    def std_code(self) -> str:
        """The standard deviation in plain torch, [N]."""
        raise NotImplementedError

    def code(self) -> list[str]:
        return [f"std = {self.std_code()}", f"A = A / torch.where(std == 0, 1.0, std + {self.eps})"]


@dataclass(frozen=True)
class GroupStd(_Std):
    """Divided by the group's unbiased standard deviation (ddof 1) plus eps. A group of one is left as it is."""

    option: ClassVar[str] = "group_std"
    divided_by: ClassVar[str] = "the standard deviation of its group's scores"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})
    coupling: ClassVar[str] = "group"
    symbol: ClassVar[str] = "std_g(R)"
    one_where: ClassVar[str | None] = _ALONE
    eps: float = param("eps", 1e-6, "added to the standard deviation", above=0, high=1)

    def std(self, signal: Signal) -> Tensor:
        groups = signal.groups("advantage_scale='group_std'")
        return _ones_where(groups.singleton, groups.std(), self.eps)

    def std_code(self) -> str:
        return "std_g(R)"


@dataclass(frozen=True)
class GroupStdBiased(_Std):
    """Divided by the group's biased standard deviation (ddof 0) plus eps."""

    option: ClassVar[str] = "group_std_biased"
    divided_by: ClassVar[str] = "the standard deviation of its group's scores"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})
    coupling: ClassVar[str] = "group"
    symbol: ClassVar[str] = "std0_g(R)"
    one_where: ClassVar[str | None] = _ALONE
    eps: float = param("eps", 1e-6, "added to the standard deviation", above=0, high=1)

    def std(self, signal: Signal) -> Tensor:
        groups = signal.groups("advantage_scale='group_std_biased'")
        return _ones_where(groups.singleton, groups.std(ddof=0), self.eps)

    def std_code(self) -> str:
        return "std_g(R, ddof=0)"


@dataclass(frozen=True)
class BatchStd(_Std):
    """Divided by the unbiased standard deviation of R over the batch plus eps (Lite-PPO, arXiv:2508.08221)."""

    option: ClassVar[str] = "batch_std"
    divided_by: ClassVar[str] = "the standard deviation of the update's scores"
    needs: ClassVar[frozenset[str]] = frozenset({"reward"})
    coupling: ClassVar[str] = "batch"
    shift_invariant: ClassVar[bool] = False  # prompts may be shifted apart
    symbol: ClassVar[str] = "std_batch(R)"
    eps: float = param("eps", 1e-6, "added to the standard deviation", above=0, high=1)

    def std(self, signal: Signal) -> Tensor:
        return signal.everyone().std()

    def std_code(self) -> str:
        return "R.std().expand_as(R)"


@dataclass(frozen=True)
class LOOStd(_Std):
    """Divided by the unbiased standard deviation of the group's other rewards plus eps; a zero one leaves A."""

    option: ClassVar[str] = "loo_std"
    divided_by: ClassVar[str] = "the standard deviation of the others' scores"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})
    coupling: ClassVar[str] = "group"
    symbol: ClassVar[str] = "std_{j≠i}(R_j)"
    one_where: ClassVar[str | None] = "std_{j≠i}(R_j) = 0"
    eps: float = param("eps", 1e-6, "added to the standard deviation", above=0, high=1)

    def std(self, signal: Signal) -> Tensor:
        std = signal.groups("advantage_scale='loo_std'").std_of_others()
        return _ones_where(std == 0, std, self.eps)

    def std_code(self) -> str:
        return "std_of_others()"


@dataclass(frozen=True)
class Whiten(Scale):
    """(A - mean) / sqrt(var + 1e-8) over all valid tokens, unbiased; fewer than two of them, or equal ones, give 0."""

    option: ClassVar[str] = "whiten"
    divided_by: ClassVar[str] = "the standard deviation of all tokens' advantages"
    shifted_by: ClassVar[str] = "the mean advantage of all tokens"
    per_token: ClassVar[bool] = True
    coupling: ClassVar[str] = "batch"

    def __call__(self, advantage: Tensor, signal: Signal) -> Tensor:
        shift, divisor = self.parts(advantage, signal)
        return (advantage - shift) / divisor

    def parts(self, advantage: Tensor, signal: Signal) -> tuple[Tensor, Tensor]:
        mask = signal.batch.valid
        valid, count = advantage[mask], mask.sum()
        if count < 2 or valid.max() == valid.min():
            return advantage, torch.ones_like(advantage)
        kept = torch.where(mask, advantage, torch.zeros_like(advantage))
        mean = kept.sum() / count
        centered = torch.where(mask, advantage - mean, torch.zeros_like(advantage))
        unit = unit_of(centered.abs().max())
        centered = centered / unit
        return mean, unit * ((centered**2).sum() / (count - 1) + 1e-8 / unit**2).sqrt()

    def formula(self, text: str, zero_alone: bool) -> str:
        return f"whiten({text})"

    def code(self) -> list[str]:
        return [
            "A = A.expand(mask.shape) if A.ndim == 2 else A[:, None].expand(mask.shape)",
            "A = (A - A[mask].mean()) / (A[mask].var() + 1e-8).sqrt()",
        ]


SCALE: dict[str, type[Scale]] = options(*pieces_in(Scale, globals()))

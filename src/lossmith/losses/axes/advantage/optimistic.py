"""The advantage as if each group had one more completion, of the largest reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.advantage.signal import Estimator, Signal
from lossmith.losses.piece import number, param

__all__ = ["Optimistic"]


@dataclass(frozen=True)
class Optimistic(Estimator):
    """A = (R - m)/(s + eps), mean and standard deviation of the group and one more completion of the largest reward:
    groups of failures alone teach too (NGRPO, arXiv:2509.18851, after the authors' code). A group of one gets 0.
    """

    option: ClassVar[str] = "optimistic"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})
    scalable: ClassVar[bool] = False
    homogeneous: ClassVar[bool] = False
    coupling: ClassVar[str] = "group"
    compares: ClassVar[str] = "group"
    zero_alone: ClassVar[bool] = True
    largest: float = param("max_reward", 1.0, "the largest reward that a completion can have")
    eps: float = param("eps", 1e-6, "added to the standard deviation", above=0, high=1)

    def sequence(self, signal: Signal) -> Tensor:
        groups = signal.groups("advantage='optimistic'")
        n, over = groups.size, self.largest - groups.mean
        mean = groups.mean + over / (n + 1)
        square = (n - 1) * groups.std() ** 2 + n / (n + 1) * over**2
        found = (groups.reward - mean) / ((square / n.clamp(min=1)).sqrt() + self.eps)
        best = groups.constant & (groups.reward == self.largest)
        return torch.where(groups.singleton | best, torch.zeros_like(found), found)

    def formula(self) -> str:
        m, e = number(self.largest), number(self.eps)
        mean = f"m = (|g|·mean_g(R) + {m})/(|g| + 1)"
        spread = f"s = √((Σ_{{j∈g}} (R_j − m)² + ({m} − m)²)/|g|)"
        return f"0 if |g| = 1 else (R − m)/(s + {e}) where {mean}; {spread}"

    def code(self) -> list[str]:
        return [
            f"n, over = size_g().to(R.dtype), {self.largest} - mean_g(R)",
            "std = (((n - 1) * std_g(R) ** 2 + n / (n + 1) * over**2) / n).sqrt()",
            f"A = torch.where(n == 1, 0.0, (R - mean_g(R) - over / (n + 1)) / (std + {self.eps}))",
        ]

"""Reward shaping: what happens to a completion's score before it becomes an advantage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.errors import LossError
from lossmith.losses.batch import Batch
from lossmith.losses.piece import Piece, number, options, param

__all__ = ["SHAPING", "Affine", "ClipReward", "Overlong", "Shaping"]


class Shaping(Piece):
    """R -> R', on rewards [N] or [N, T]."""

    def __call__(self, reward: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError

    def formula(self) -> tuple[str, str]:
        """(text, LaTeX) of the shaped reward in terms of R."""
        raise NotImplementedError


@dataclass(frozen=True)
class ClipReward(Shaping):
    """R ← clip(R, low, high)."""

    option: ClassVar[str] = "clip"
    low: float = param("reward_low", -math.inf, "smallest reward that counts")
    high: float = param("reward_high", math.inf, "largest reward that counts")

    def __call__(self, reward: Tensor, batch: Batch) -> Tensor:
        return reward.clamp(self.low, self.high)

    def formula(self) -> tuple[str, str]:
        lo, hi = number(self.low), number(self.high)
        return f"clip(R, {lo}, {hi})", rf"\operatorname{{clip}}(R, {lo}, {hi})"


@dataclass(frozen=True)
class Affine(Shaping):
    """R ← a(R + b)."""

    option: ClassVar[str] = "scale"
    a: float = param("a", 1.0, "factor of the shifted reward")
    b: float = param("b", 0.0, "shift added to the reward first")

    def __call__(self, reward: Tensor, batch: Batch) -> Tensor:
        return self.a * (reward + self.b)

    def formula(self) -> tuple[str, str]:
        return (f"{number(self.a)}·(R + {number(self.b)})",) * 2


@dataclass(frozen=True)
class Overlong(Shaping):
    """DAPO's soft punishment of long completions, arXiv:2503.14476, eq. 13.

    With length T, limit L and buffer C: add 0 up to L - C, then (L - C - T)/C down to -1 at L, and -1 beyond.
    """

    option: ClassVar[str] = "overlong"
    needs: ClassVar[frozenset[str]] = frozenset({"max_length"})
    max_length: int | None = param("max_length", None, "token limit L of a completion (training fills it in)", above=0)
    buffer: int | None = param("buffer", None, "length C of the soft zone; a fifth of max_length if not given", above=0)
    penalty: float = param("penalty", 1.0, "size of the full punishment", low=0)

    def __call__(self, reward: Tensor, batch: Batch) -> Tensor:
        if self.max_length is None:
            raise LossError("overlong shaping needs max_length, the token limit of a completion: pass max_length=...")
        buffer = self._buffer()
        length = batch.lengths.to(reward.dtype)
        punished = ((self.max_length - buffer - length) / buffer).clamp(-1.0, 0.0) * self.penalty
        return reward + (punished if reward.ndim == 1 else on_last_token(punished, batch.valid))

    def _buffer(self) -> int:
        assert self.max_length is not None
        return self.buffer or max(1, self.max_length // 5)

    def formula(self) -> tuple[str, str]:
        limit = "L" if self.max_length is None else str(self.max_length)
        soft = "L/5" if self.max_length is None else str(self._buffer())
        k = "" if self.penalty == 1 else f"{number(self.penalty)}·"
        text = f"R + {k}clip(({limit} − {soft} − T)/{soft}, −1, 0)"
        return (
            text,
            rf"R + {k.replace('·', '')}\operatorname{{clip}}\left(\frac{{{limit}-{soft}-T}}{{{soft}}},-1,0\right)",
        )


def on_last_token(per_row: Tensor, mask: Tensor) -> Tensor:
    """[N] -> [N, T] with the number on each row's last valid token, zero elsewhere."""
    position = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, position, -1).amax(1, keepdim=True) if mask.shape[1] else position[None]
    return torch.where((position == last) & mask, per_row[:, None], torch.zeros((), dtype=per_row.dtype))


SHAPING = options(ClipReward, Affine, Overlong)

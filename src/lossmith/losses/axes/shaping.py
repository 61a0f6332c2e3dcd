"""Reward shaping: what happens to a completion's score before it becomes an advantage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.errors import LossError
from lossmith.losses.as_tensor import wide
from lossmith.losses.batch import Batch
from lossmith.losses.piece import Piece, in_code, number, options, param, pieces_in

__all__ = ["SHAPING", "ClipReward", "Overlong", "Potential", "ScaleReward", "Shaping", "WeightedSum"]


class Shaping(Piece):
    """R -> R', on rewards [N] or [N, T]."""

    by_token: ClassVar[bool] = False  # it gives a reward to each token

    def __call__(self, reward: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError

    def formula(self) -> str:
        """The shaped reward in terms of R, or of r_t where it is `by_token`."""
        raise NotImplementedError

    def code(self) -> list[str]:
        """Lines of plain torch that change R [N]."""
        raise NotImplementedError


@dataclass(frozen=True)
class ClipReward(Shaping):
    """R ← clip(R, low, high)."""

    option: ClassVar[str] = "clip"
    ordered: ClassVar[tuple[tuple[str, str], ...]] = (("low", "high"),)
    low: float = param("reward_low", -math.inf, "smallest reward that counts", bound=True)
    high: float = param("reward_high", math.inf, "largest reward that counts", bound=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low == self.high:
            raise LossError(f"reward_low = reward_high = {self.low} makes all rewards equal: give a lower reward_low.")

    def __call__(self, reward: Tensor, batch: Batch) -> Tensor:
        return reward.clamp(self.low, self.high)

    def formula(self) -> str:
        return f"clip(R, {number(self.low)}, {number(self.high)})"

    def code(self) -> list[str]:
        return [f"R = R.clamp({in_code(self.low)}, {in_code(self.high)})"]


@dataclass(frozen=True)
class ScaleReward(Shaping):
    """R ← a(R + b)."""

    option: ClassVar[str] = "scale"
    a: float = param("a", 1.0, "factor of the shifted reward")
    b: float = param("b", 0.0, "shift added to the reward first")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.a == 0:
            raise LossError("shaping='scale' with a = 0 makes all rewards equal: nothing could be learned from them.")

    def __call__(self, reward: Tensor, batch: Batch) -> Tensor:
        return self.a * (reward + self.b)

    def formula(self) -> str:
        return f"{number(self.a)}·(R + {number(self.b)})"

    def code(self) -> list[str]:
        return [f"R = {self.a} * (R + {self.b})"]


@dataclass(frozen=True)
class Overlong(Shaping):
    """DAPO's soft punishment of long completions, arXiv:2503.14476, eq. 13.

    With length T, limit L and buffer C: add 0 up to L - C, then (L - C - T)/C down to -1 at L, and -1 beyond.
    """

    option: ClassVar[str] = "overlong"
    max_length: int | None = param(
        "max_length", None, "token limit L of a completion (training fills it in)", above=0, required=True
    )
    buffer: int | None = param("buffer", None, "length C of the soft zone; a fifth of max_length if not given", above=0)
    penalty: float = param("penalty", 1.0, "size of the full punishment", low=0)

    def __call__(self, reward: Tensor, batch: Batch) -> Tensor:
        limit, buffer = self.given("max_length"), self._buffer()
        length = batch.lengths.to(reward.dtype)
        punished = ((limit - buffer - length) / buffer).clamp(-1.0, 0.0) * self.penalty
        return reward + (punished if reward.ndim == 1 else on_last_token(punished, batch.valid))

    def _buffer(self) -> int:
        return self.buffer or max(1, self.given("max_length") // 5)

    def formula(self) -> str:
        limit, soft = ("L", "(L/5)") if self.max_length is None else (str(self.max_length), str(self._buffer()))
        if self.max_length is None and self.buffer is not None:
            soft = str(self.buffer)
        k = "" if self.penalty == 1 else f"{number(self.penalty)}·"
        return f"R + {k}clip(({limit} − {soft} − T)/{soft}, −1, 0)"

    def code(self) -> list[str]:
        limit, soft = self.max_length, self._buffer()
        return [f"R = R + {self.penalty} * (({limit} - {soft} - T) / {soft}).clamp(-1, 0)"]


@dataclass(frozen=True)
class WeightedSum(Shaping):
    """R ← Σ_k w_k R_k over the scores of Batch.reward_parts."""

    option: ClassVar[str] = "weighted_sum"
    needs: ClassVar[frozenset[str]] = frozenset({"reward_parts"})
    weights: tuple[float, ...] = param("score_weights", (), "weight of each score; all 1 if not given")

    def __call__(self, reward: Tensor, batch: Batch) -> Tensor:
        parts = wide(batch.require("reward_parts", "shaping='weighted_sum'"))
        return parts @ torch.tensor(part_weights(self.weights, parts), dtype=parts.dtype, device=parts.device)

    def formula(self) -> str:
        return " + ".join(f"{number(w)}·R_{k + 1}" for k, w in enumerate(self.weights)) or "Σ_k R_k"

    def code(self) -> list[str]:
        if not self.weights:
            return ["R = reward_parts.sum(1)"]
        return [f"R = reward_parts @ torch.tensor({list(self.weights)}, dtype=reward_parts.dtype)"]


@dataclass(frozen=True)
class Potential(Shaping):
    """r_t ← r_t + gamma·Φ_{t+1} - Φ_t, Φ after the last token 0 (book eq. 4.65): the best policy stays the best."""

    option: ClassVar[str] = "potential"
    by_token: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"potential"})
    gamma: float = param("gamma", 1.0, "discount per token", low=0, high=1)

    def __call__(self, reward: Tensor, batch: Batch) -> Tensor:
        potential, valid = batch.require("potential", "shaping='potential'"), batch.valid
        per_token = reward if reward.ndim == 2 else on_last_token(reward, valid)
        after, change = torch.zeros_like(potential[:, 0]), torch.zeros_like(potential)
        for t in reversed(range(valid.shape[1])):  # masked tokens are stepped over
            change[:, t] = torch.where(valid[:, t], self.gamma * after - potential[:, t], 0.0)
            after = torch.where(valid[:, t], potential[:, t], after)
        return per_token + change

    def formula(self) -> str:
        return f"r_t + {'' if self.gamma == 1 else number(self.gamma) + '·'}Φ_{{t+1}} − Φ_t"

    def code(self) -> list[str]:
        return [
            "r_t, after = on_last(R), torch.zeros_like(potential[:, 0])",
            "for t in reversed(range(mask.shape[1])):",
            f"    r_t[:, t] += torch.where(mask[:, t], {self.gamma} * after - potential[:, t], 0.0)",
            "    after = torch.where(mask[:, t], potential[:, t], after)",
        ]


def on_last_token(per_row: Tensor, mask: Tensor) -> Tensor:
    """[N] -> [N, T] with the number on each row's last valid token, zero elsewhere."""
    position = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, position, -1).amax(1, keepdim=True) if mask.shape[1] else position[None]
    return torch.where((position == last) & mask, per_row[:, None], torch.zeros((), dtype=per_row.dtype))


def part_weights(weights: tuple[float, ...], parts: Tensor) -> list[float]:
    """One weight for each column of reward_parts [N, K]; 1 each if none are given."""
    if weights and len(weights) != parts.shape[1]:
        raise LossError(
            f"score_weights has {len(weights)} numbers, but Batch.reward_parts has {parts.shape[1]} scores."
        )
    return list(weights) or [1.0] * parts.shape[1]


SHAPING: dict[str, type[Shaping]] = options(*pieces_in(Shaping, globals()))

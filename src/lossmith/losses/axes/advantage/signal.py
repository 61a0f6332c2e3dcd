"""What an estimator sees: shaped rewards, and statistics of them within each prompt's group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.shaping import on_last_token
from lossmith.losses.batch import Batch
from lossmith.losses.piece import Piece

__all__ = ["Estimator", "Groups", "Signal"]


def unit_of(size: Tensor) -> Tensor:
    """What to divide numbers of this size by before they are squared: 1, or the size where its square overflows."""
    return torch.where(size > torch.finfo(size.dtype).max ** 0.25, size, torch.ones_like(size))


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

    @property
    def without_itself(self) -> Tensor:
        """[N], R minus the mean of the group's other rewards: G/(G-1) (R - mean)."""
        return self.size / (self.size - 1).clamp(min=1) * (self.reward - self.mean)

    def std(self, ddof: int = 1) -> Tensor:
        centered = self.reward - self.mean
        unit = unit_of(self._extreme(centered.abs(), "amax"))
        square = self.total((centered / unit) ** 2)
        return unit * (square / (self.size - ddof).clamp(min=1)).sqrt()

    def std_of_others(self) -> Tensor:
        """[N], unbiased standard deviation of the group's other rewards; 0 where they are equal or fewer than two."""
        others = (self.index[:, None] == self.index) & self.live
        others = others & ~torch.eye(len(others), dtype=torch.bool, device=others.device)
        reward, count = self.reward.expand(others.shape), others.sum(1)
        zero = torch.zeros_like(reward)
        mean = torch.where(others, reward, zero).sum(1) / count.clamp(min=1)
        centered = torch.where(others, reward - mean[:, None], zero)
        unit = unit_of(centered.abs().amax(1) if len(others) else mean)
        std = unit * ((centered / unit[:, None]).square().sum(1) / (count - 1).clamp(min=1)).sqrt()
        # equal numbers have a standard deviation of exactly 0, whatever rounding says
        low = torch.where(others, reward, zero + torch.inf).amin(1, keepdim=True) if len(others) else std[:, None]
        equal = (torch.where(others, reward, low) == low).all(1)
        return torch.where(equal | (count < 2), torch.zeros_like(std), std)

    def _extreme(self, x: Tensor, reduce: str) -> Tensor:
        """[N] -> [N]: the smallest or largest x over the live rows of each row's group ("amin" or "amax")."""
        gone = torch.full_like(x, torch.inf if reduce == "amin" else -torch.inf)
        start = gone[:1].expand(int(self.index.max()) + 1 if len(x) else 0)
        found = start.scatter_reduce(0, self.index, torch.where(self.live, x, gone), reduce)
        return found[self.index]

    @property
    def largest(self) -> Tensor:
        return self._extreme(self.reward, "amax")

    @property
    def constant(self) -> Tensor:
        """[N] bool: every live reward of the group is the same number (a group of one included)."""
        return self.largest <= self._extreme(self.reward, "amin")

    def first_where(self, holds: Tensor) -> Tensor:
        """[N] bool: the first live row of each group for which it holds."""
        place = torch.arange(len(holds), device=holds.device).to(self.reward.dtype)
        held = torch.where(holds & self.live, place, torch.full_like(place, torch.inf))
        return holds & self.live & (place == self._extreme(held, "amin"))

    @property
    def singleton(self) -> Tensor:
        return self.size <= 1


@dataclass(frozen=True, eq=False)
class Signal:
    """Shaped rewards with the KL penalty taken off, and what surrounds them."""

    batch: Batch
    reward: Tensor  # [N] or [N, T]
    counted: Tensor | None = None  # [N] bool, completions in the statistics; those with a valid token if not given

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
        return self.batch.live if self.counted is None else self.counted

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
    scalable: ClassVar[bool] = True  # a scale may divide it
    critic: ClassVar[bool] = False  # reads values V_t, and says by `target` what they are trained towards
    coupling: ClassVar[str] = "sequence"
    compared_to: ClassVar[str] = ""  # in words, the b of A = R - b, where it has that form
    compares: ClassVar[str] = ""  # with what a reward is compared, and is 0 without: "group", "batch", or "" (nothing)
    shift_invariant: ClassVar[bool] = False  # promises: R + c within each group changes nothing
    scale_invariant: ClassVar[bool] = False  # promises: c·R with c > 0 changes nothing (but for eps)
    zero_alone: ClassVar[bool] = False  # a completion without others of its prompt gets 0
    homogeneous: ClassVar[bool] = True  # c·R gives c·A, so that a scale takes c out again

    def __call__(self, signal: Signal) -> Tensor:
        """[N, T]; what stands at masked positions does not matter."""
        return self.sequence(signal)[:, None].expand(signal.batch.valid.shape)

    def sequence(self, signal: Signal) -> Tensor:
        """[N], for estimators that give one number to a completion."""
        raise NotImplementedError

    def baseline(self, signal: Signal) -> Tensor | None:
        """b [N], where A = R - b; None: A has another form."""
        return signal.per_sequence - self.sequence(signal) if self.compared_to else None

    def target(self, signal: Signal, advantage: Tensor) -> Tensor:
        """What the critic is trained towards, [N, T], from the advantage before scaling; asked of a `critic` only."""
        raise NotImplementedError

    def target_formula(self) -> str:
        """That target G; A is the advantage before scaling."""
        return "as given"

    def target_code(self) -> list[str]:
        """Lines of plain torch that compute the target `G` [N, T]."""
        return ["G = returns"]

    def formula(self) -> str:
        """The advantage in terms of R or r_t."""
        raise NotImplementedError

    def code(self) -> list[str]:
        """Lines of plain torch that compute `A` [N] or [N, T] from R [N], group and helpers such as mean_g."""
        raise NotImplementedError

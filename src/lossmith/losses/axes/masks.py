"""What is left out: tokens and completions that keep their place in the normalizer, and completions that lose it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.advantage import Signal
from lossmith.losses.batch import Batch
from lossmith.losses.piece import Piece, number, options, param, pieces_in, symbol

__all__ = [
    "GROUP_FILTER",
    "OPSM",
    "SEQUENCE_MASK",
    "TOKEN_MASK",
    "Above",
    "Best",
    "GroupFilter",
    "Mask",
    "NoFilter",
    "NoMask",
    "Staleness",
    "TopEntropy",
    "ZeroVariance",
]


# -- masks: the policy term of what they drop is 0, the normalizer stays that of the whole batch ----------------------


class Mask(Piece):
    """Which valid tokens keep their policy term, [N, T] bool; no gradient."""

    homogeneous: ClassVar[bool] = True  # cA keeps the same tokens as A, for c > 0

    def keep(self, batch: Batch, advantage: Tensor) -> Tensor | None:
        """None: all of them."""
        return None

    def formula(self) -> str | None:
        """The condition under which a token is kept; None: nothing to say."""
        return None

    def code(self) -> list[str]:
        """Lines of plain torch that set `keep` [N, T]."""
        return []


@dataclass(frozen=True)
class NoMask(Mask):
    """Everything counts."""

    option: ClassVar[str] = "none"
    acts: ClassVar[bool] = False


@dataclass(frozen=True)
class TopEntropy(Mask):
    """Tokens whose entropy is at least the (1 - top_entropy) quantile over the valid tokens (arXiv:2506.01939)."""

    option: ClassVar[str] = "top_entropy"
    whole_batch: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    share: float = param("top_entropy", 0.2, "share of the tokens that is kept", above=0, high=1)

    def keep(self, batch: Batch, advantage: Tensor) -> Tensor | None:
        entropy = batch.require("entropy", "token_mask='top_entropy'").detach()
        if not bool(batch.valid.any()):
            return None
        return entropy >= quantile(entropy[batch.valid], 1 - min(self.share, 1.0))

    def formula(self) -> str | None:
        return f"H_t ≥ quantile(H_t, {number(1 - min(self.share, 1.0))})"

    def code(self) -> list[str]:
        return [f"keep = entropy >= torch.quantile(entropy[mask], 1 - {min(self.share, 1.0)})"]


def quantile(x: Tensor, q: float) -> Tensor:
    """Linear interpolation between order statistics, for any number of elements (torch.quantile stops at 16M)."""
    x, place = x.sort().values, q * (len(x) - 1)
    low = int(place)
    high = min(low + 1, len(x) - 1)
    return torch.lerp(x[low], x[high], place - low)


@dataclass(frozen=True)
class OPSM(Mask):
    """Without completions that have A < 0 and mean_t(log μ - log π_θ) > opsm_delta (OPSM, arXiv:2512.02556).

    μ falls back to the old policy where the sampler's log-probabilities are not given.
    """

    option: ClassVar[str] = "opsm"
    looks_at: ClassVar[frozenset[str]] = frozenset({"behavior_logp"})
    delta: float | None = param(
        "opsm_delta", None, "mean log-ratio (nats) beyond which a bad completion is dropped", required=True, bound=True
    )

    def mean_gap(self, batch: Batch) -> Tensor:
        """[N, 1] mean of log μ - log π_θ over the completion."""
        mu = batch.behavior_logp if batch.behavior_logp is not None else batch.old("sequence_mask='opsm'")
        gap = mu.detach() - batch.require("logp", "sequence_mask='opsm'").detach()
        return gap.sum(1, keepdim=True) / batch.lengths.clamp(min=1)[:, None]

    def keep(self, batch: Batch, advantage: Tensor) -> Tensor | None:
        return ~((advantage < 0) & (self.mean_gap(batch) > self.given("delta")))

    def formula(self) -> str | None:
        return f"not (A < 0 and mean_t(log μ(y_t) − log π_θ(y_t)) > {symbol(self.delta, 'δ')})"

    def code(self) -> list[str]:
        return [
            "gap = ((behavior_logp - logp.detach()) * mask).sum(1, keepdim=True) / T[:, None]",
            f"keep = ~((A < 0) & (gap > {self.delta}))",
        ]


@dataclass(frozen=True)
class Staleness(Mask):
    """Without completions sampled more than max_lag policy versions ago."""

    option: ClassVar[str] = "staleness"
    needs: ClassVar[frozenset[str]] = frozenset({"lag"})
    max_lag: int | None = param(
        "max_lag", None, "largest number of policy versions since sampling", low=0, required=True
    )

    def keep(self, batch: Batch, advantage: Tensor) -> Tensor | None:
        lag = batch.require("lag", "sequence_mask='staleness'")
        return (lag <= self.given("max_lag"))[:, None].expand_as(batch.valid)

    def formula(self) -> str | None:
        return f"lag ≤ {symbol(self.max_lag, 'max_lag')}"

    def code(self) -> list[str]:
        return [f"keep = (lag <= {self.max_lag})[:, None]"]


TOKEN_MASK: dict[str, type[Mask]] = options(NoMask, TopEntropy)
SEQUENCE_MASK: dict[str, type[Mask]] = options(NoMask, OPSM, Staleness)


# -- filters: what they drop is gone, from the normalizer too ----------------------------------------------------------


class GroupFilter(Piece):
    """Which completions take part, [N] bool, judged by their raw reward."""

    coupling: ClassVar[str] = "group"
    compares: ClassVar[str] = ""  # with what a completion is compared: "group", or "" (nothing)

    def keep(self, batch: Batch) -> Tensor | None:
        """None: all of them."""
        return None

    def formula(self) -> str | None:
        """The condition under which completion i takes part; None: nothing to say."""
        return None

    def code(self) -> list[str]:
        """Lines of plain torch that set `keep_row` [N]."""
        return []


@dataclass(frozen=True)
class NoFilter(GroupFilter):
    """Every completion takes part."""

    option: ClassVar[str] = "none"
    acts: ClassVar[bool] = False
    coupling: ClassVar[str] = "token"


@dataclass(frozen=True)
class ZeroVariance(GroupFilter):
    """Without groups whose rewards are all equal (DAPO, arXiv:2503.14476): they carry no signal."""

    option: ClassVar[str] = "zero_variance"
    compares: ClassVar[str] = "group"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})

    def keep(self, batch: Batch) -> Tensor | None:
        if batch.reward is None:  # the advantage is given
            return None
        return ~Signal(batch, batch.reward).groups("group_filter='zero_variance'").constant

    def formula(self) -> str | None:
        return "max_g(R) > min_g(R)"

    def code(self) -> list[str]:
        return ["keep_row = max_g(R) > min_g(R)"]


@dataclass(frozen=True)
class Best(GroupFilter):
    """Only the completion with the highest reward of each group; the first, if several have it (arXiv:2304.06767)."""

    option: ClassVar[str] = "best"
    compares: ClassVar[str] = "group"
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "group"})

    def keep(self, batch: Batch) -> Tensor | None:
        groups = Signal(batch, batch.require("reward", "group_filter='best'")).groups("group_filter='best'")
        return groups.first_where(groups.reward == groups.largest)

    def formula(self) -> str | None:
        return "i = argmax_g(R)"

    def code(self) -> list[str]:
        return [
            "best = R == max_g(R)",
            "earlier = (group[:, None] == group) & torch.ones(len(R), len(R), dtype=torch.bool).tril(-1)",
            "keep_row = best & ~(earlier & best).any(1)  # ties: the first",
        ]


@dataclass(frozen=True)
class Above(GroupFilter):
    """Only completions with a reward above the threshold (rejection sampling, arXiv:2112.09332)."""

    option: ClassVar[str] = "above"
    needs: ClassVar[frozenset[str]] = frozenset({"reward"})
    threshold: float | None = param(
        "threshold", None, "reward above which a completion takes part", required=True, bound=True
    )

    def keep(self, batch: Batch) -> Tensor | None:
        signal = Signal(batch, batch.require("reward", "group_filter='above'"))
        return signal.per_sequence > self.given("threshold")

    def formula(self) -> str | None:
        return f"R > {symbol(self.threshold, 'τ')}"

    def code(self) -> list[str]:
        return [f"keep_row = R > {self.threshold}"]


GROUP_FILTER: dict[str, type[GroupFilter]] = options(*pieces_in(GroupFilter, globals()))

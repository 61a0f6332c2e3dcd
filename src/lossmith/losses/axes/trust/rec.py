"""REINFORCE whose tokens are dropped by their ratio, without a gradient through it (REC, arXiv:2509.24203), as
Trinity-RFT 0.6.0 computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.trust.base import Tokens
from lossmith.losses.axes.trust.soft import _Weighted
from lossmith.losses.piece import number, param

__all__ = ["RecOneSide", "RecRing", "RecTwoSide"]


def _low() -> float:
    low: float = param("clip_low", 0.2, "1 - clip_low is the smallest ratio that counts", low=0, bound=True)
    return low


def _high() -> float:
    high: float = param("clip_high", 0.2, "1 + clip_high is the largest ratio that counts", low=0, bound=True)
    return high


def _weighted() -> bool:
    weighted: bool = param("rec_weighted", True, "tokens that are kept weigh as much as their ratio, and not 1")
    return weighted


class _Rec(_Weighted):
    """ℓ = -sg(keep·r)·A·logp, or -sg(keep)·A·logp."""

    low: float
    high: float
    weighted: bool

    @property
    def stops_gradient(self) -> bool:  # type: ignore[override]
        return self.weighted

    def kept(self, at: Tokens) -> Tensor:
        """Which tokens count, as the paper prints it, bool."""
        raise NotImplementedError

    def dropped(self, at: Tokens) -> Tensor:
        """Which do not, by hand, bool."""
        raise NotImplementedError

    def kept_text(self) -> str:
        """The condition of `kept`."""
        raise NotImplementedError

    def kept_code(self) -> str:
        """The same in code."""
        raise NotImplementedError

    def bounds(self, at: Tokens) -> tuple[float, float]:
        return max(1 - self.low, 0.0), 1 + self.high

    def printed(self, at: Tokens) -> Tensor:
        keep = self.kept(at).to(at.ratio.dtype)
        return keep * at.ratio if self.weighted else keep

    def weight(self, at: Tokens) -> Tensor:
        one = torch.ones_like(at.ratio)
        return torch.where(self.dropped(at), torch.zeros_like(one), at.ratio.detach() if self.weighted else one)

    def weight_formula(self) -> str:
        return f"{'r·' * self.weighted}[{self.kept_text()}]"

    def weight_code(self) -> list[str]:
        kept = "torch.where(keep, r, 0.0)" if self.weighted else "keep.to(r.dtype)"
        return [f"keep = {self.kept_code()}", f"w = {kept}"]


@dataclass(frozen=True)
class RecOneSide(_Rec):
    """Drops tokens whose ratio is already past the bound that their advantage pushes to."""

    option: ClassVar[str] = "rec_one_side"
    low: float = _low()
    high: float = _high()
    weighted: bool = _weighted()

    def kept(self, at: Tokens) -> Tensor:
        good = (at.advantage >= 0) & (at.ratio <= 1 + self.high)
        return good | ((at.advantage <= 0) & (at.ratio >= 1 - self.low))

    def dropped(self, at: Tokens) -> Tensor:
        return ((at.ratio > 1 + self.high) & (at.advantage >= 0)) | ((at.ratio < 1 - self.low) & (at.advantage < 0))

    def kept_text(self) -> str:
        low, high = number(1 - self.low), number(1 + self.high)
        return f"(A ≥ 0 and r ≤ {high}) or (A ≤ 0 and r ≥ {low})"

    def kept_code(self) -> str:
        return f"((A >= 0) & (r <= 1 + {self.high})) | ((A <= 0) & (r >= 1 - {self.low}))"


@dataclass(frozen=True)
class RecTwoSide(_Rec):
    """Drops tokens whose ratio is outside the bounds, whatever the sign of their advantage."""

    option: ClassVar[str] = "rec_two_side"
    low: float = _low()
    high: float = _high()
    weighted: bool = _weighted()

    def kept(self, at: Tokens) -> Tensor:
        return (at.ratio >= 1 - self.low) & (at.ratio <= 1 + self.high)

    def dropped(self, at: Tokens) -> Tensor:
        return (at.ratio > 1 + self.high) | (at.ratio < 1 - self.low)

    def kept_text(self) -> str:
        return f"{number(1 - self.low)} ≤ r ≤ {number(1 + self.high)}"

    def kept_code(self) -> str:
        return f"(r >= 1 - {self.low}) & (r <= 1 + {self.high})"


@dataclass(frozen=True)
class RecRing(_Rec):
    """Drops tokens in two rings beside the bounds; those further out count where their advantage pushes them back."""

    option: ClassVar[str] = "rec_ring"
    low: float = _low()
    high: float = _high()
    far_low: float = param("far_low", 0.4, "from 1 - far_low down, tokens with A >= 0 count again", low=0, bound=True)
    far_high: float = param("far_high", 0.4, "from 1 + far_high up, tokens with A <= 0 count again", low=0, bound=True)
    weighted: bool = _weighted()

    def kept(self, at: Tokens) -> Tensor:
        inside = (at.ratio >= 1 - self.low) & (at.ratio <= 1 + self.high)
        back = (at.advantage >= 0) & (at.ratio <= 1 - self.far_low)
        return inside | back | ((at.advantage <= 0) & (at.ratio >= 1 + self.far_high))

    def dropped(self, at: Tokens) -> Tensor:
        above = (at.ratio > 1 + self.high) & ((at.ratio < 1 + self.far_high) | (at.advantage >= 0))
        return above | ((at.ratio < 1 - self.low) & ((at.ratio > 1 - self.far_low) | (at.advantage < 0)))

    def kept_text(self) -> str:
        low, high, far_low, far_high = (
            number(x) for x in (1 - self.low, 1 + self.high, 1 - self.far_low, 1 + self.far_high)
        )
        return f"{low} ≤ r ≤ {high} or (A ≥ 0 and r ≤ {far_low}) or (A ≤ 0 and r ≥ {far_high})"

    def kept_code(self) -> str:
        inside = f"((r >= 1 - {self.low}) & (r <= 1 + {self.high}))"
        return f"{inside} | ((A >= 0) & (r <= 1 - {self.far_low})) | ((A <= 0) & (r >= 1 + {self.far_high}))"

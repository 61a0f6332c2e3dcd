"""A composition: what was chosen on each axis, as data, and what follows from the choices.

It asks its pieces (`acts`, `reads_old`, `coupling`, ...) and never which class they are, so that a piece of one's own
can say whatever a built-in one can.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lossmith.losses.axes.advantage import BatchMean, Estimator, NoScale, Scale
from lossmith.losses.axes.aggregate import Aggregate, TokenMean
from lossmith.losses.axes.extra import Extra
from lossmith.losses.axes.extra.terms import NoExtra
from lossmith.losses.axes.kl import KL
from lossmith.losses.axes.masks import GroupFilter, Mask, NoFilter, NoMask
from lossmith.losses.axes.mismatch import Mismatch, NoMismatch
from lossmith.losses.axes.ratio import Ratio, TokenRatio
from lossmith.losses.axes.shaping import Shaping
from lossmith.losses.axes.trust import LogP, Trust
from lossmith.losses.axes.value import ValueLoss
from lossmith.losses.composition.house import House
from lossmith.losses.piece import Piece

__all__ = ["Composition"]

_COUPLING = ("token", "sequence", "group", "batch")


@dataclass(frozen=True)
class Composition:
    """A point in a product of axes. Read the fields in the order of evaluation."""

    name: str = "custom"
    shaping: tuple[Shaping, ...] = ()
    truncated: str = "keep"  # keep | mask | zero: what becomes of completions that the token budget cut
    masked: str = (
        "leave"  # leave | keep: whether completions without a token that counts keep their reward in statistics
    )
    group_filter: GroupFilter = dataclasses.field(default_factory=NoFilter)
    advantage: Estimator = dataclasses.field(default_factory=BatchMean)
    advantage_scale: Scale = dataclasses.field(default_factory=NoScale)
    advantage_mul: float = 1.0
    advantage_clip: float | None = None
    ratio_level: Ratio = dataclasses.field(default_factory=TokenRatio)
    trust: Trust = dataclasses.field(default_factory=LogP)
    token_mask: Mask = dataclasses.field(default_factory=NoMask)
    sequence_mask: Mask = dataclasses.field(default_factory=NoMask)
    mismatch: Mismatch = dataclasses.field(default_factory=NoMismatch)
    kl: KL = dataclasses.field(default_factory=KL)
    entropy_coef: float = 0.0
    extra: Extra = dataclasses.field(default_factory=NoExtra)
    value: ValueLoss = dataclasses.field(default_factory=ValueLoss)
    aggregate: Aggregate = dataclasses.field(default_factory=TokenMean)
    kl_aggregate: str = "same"  # the aggregation of the KL term, where it differs
    entropy_aggregate: str = "same"
    local_normalizer: bool = False  # counts are taken over the rows at hand: micro-batches do not add up
    house: House | None = dataclasses.field(default=None, compare=False, repr=False)  # whose numbers a new option gets

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Everything that is chosen on an axis, shaping included."""
        axes = (self.group_filter, self.advantage, self.advantage_scale, self.ratio_level, self.trust, self.token_mask)
        rest = (self.sequence_mask, self.mismatch, self.kl, self.extra, self.value, self.aggregate)
        return (*self.shaping, *axes, *rest)

    @property
    def traps(self) -> tuple[str, ...]:
        local = "a local normalizer: the loss depends on how the batch is cut into micro-batches and ranks"
        return tuple(t for t in (self.trust.trap(), self.kl.trap(), local if self.local_normalizer else None) if t)

    @property
    def needs(self) -> frozenset[str]:
        conditions = {
            "entropy": self.entropy_coef > 0,
            "truncated": self.truncated != "keep",
            "returns": self.value.active and not self.advantage.acts,
        }
        needed = frozenset().union(*(piece.needs | piece.missing for piece in self.pieces))
        return needed | _where(conditions)

    @property
    def needs_ratio(self) -> bool:
        return self.trust.uses_ratio or self.kl.uses_ratio

    @property
    def uses_old(self) -> bool:
        by_ratio = self.needs_ratio and self.ratio_level.denominator == "old"
        return by_ratio or any(piece.reads_old for piece in self.pieces)

    @property
    def coupling(self) -> str:
        whole = not self.separable or self.local_normalizer
        return max([piece.coupling for piece in self.pieces] + ["batch"] * whole, key=_COUPLING.index)

    @property
    def homogeneous(self) -> bool:
        return all(piece.homogeneous for piece in (self.trust, self.token_mask, self.sequence_mask))

    @property
    def _of_credit(self) -> tuple[Piece, ...]:
        axes = (self.group_filter, self.advantage, self.advantage_scale, self.mismatch, self.aggregate)
        return (*self.shaping, *axes, *([self.kl] if self.kl.in_reward else []))

    @property
    def needs_old_early(self) -> bool:
        """A mismatch weight of single tokens or completions can be left to the objective, which has their rows."""
        left = (self.mismatch,) if self.mismatch.coupling == "token" else ()
        return any(piece.reads_old for piece in self._of_credit if piece not in left)

    @property
    def credit_reads(self) -> frozenset[str]:
        pieces = self._of_credit
        conditions = {
            "old_logp": any(piece.reads_old for piece in pieces),
            "truncated": self.truncated != "keep",
            "returns": self.value.active and not self.advantage.acts,
        }
        return _read(*pieces) | _where(conditions)

    @property
    def objective_reads(self) -> frozenset[str]:
        pieces: list[Piece] = [self.trust, self.token_mask, self.sequence_mask, self.extra, self.value]
        pieces += [self.ratio_level] if self.needs_ratio else []
        pieces += [self.kl] if self.kl.in_loss else []
        by_ratio = self.needs_ratio and self.ratio_level.denominator == "old"
        conditions = {
            "old_logp": by_ratio or any(piece.reads_old for piece in pieces),
            "entropy": self.entropy_coef > 0,
        }
        return _read(*pieces) | _where(conditions)

    @property
    def counted(self) -> bool:
        """Whether 1/Z of a token follows from its completion's length and the counts of tokens and completions."""
        left_out = self.group_filter.acts or self.truncated == "mask"
        return self.aggregate.coupling == "token" and not left_out

    @property
    def compares(self) -> str:
        return self.advantage.compares or self.group_filter.compares

    @property
    def of_truncated(self) -> str:
        return self.truncated

    @property
    def separable(self) -> bool:
        return not any(piece.whole_batch for piece in self.pieces)

    @property
    def stops_gradient(self) -> bool:
        return any(
            piece.stops_gradient for piece in self.pieces if piece is not self.ratio_level or self.trust.uses_ratio
        )


def _read(*pieces: Piece) -> frozenset[str]:
    """Fields of Batch that these read, must or may."""
    return frozenset().union(*(piece.needs | piece.looks_at for piece in pieces))


def _where(conditions: dict[str, bool]) -> frozenset[str]:
    return frozenset(name for name, holds in conditions.items() if holds)

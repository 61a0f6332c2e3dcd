"""Aggregation: the weight each token's term has in the loss, 1/Z, computed once over the whole batch.

An aggregation is nothing but token weights [N, T] without gradient. Because they are made from counts over the whole
batch, any micro-batch adds its tokens times their weights, and the sum is the same number however the batch was cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.axes.advantage import Groups
from lossmith.losses.batch import Batch, Normalizer
from lossmith.losses.piece import Piece, options, param, pieces_in, symbol

__all__ = [
    "AGGREGATE",
    "Aggregate",
    "PromptMean",
    "SeqMeanTokenMean",
    "SeqMeanTokenSum",
    "SeqMeanTokenSumNorm",
    "TokenMean",
    "TokenSum",
]


class Aggregate(Piece):
    """Token weights: L = Σ_it weight_it ℓ_it."""

    def row_weights(self, batch: Batch, norm: Normalizer, dtype: torch.dtype) -> Tensor:
        """[N], the weight of each valid token of a completion."""
        raise NotImplementedError

    def weights(self, batch: Batch, norm: Normalizer, dtype: torch.dtype) -> Tensor:
        """[N, T], 0 at masked positions."""
        return self.row_weights(batch, norm, dtype)[:, None] * batch.valid

    def code(self, term: str) -> str:
        """An expression of plain torch that aggregates `term` [N, T] over the tokens `m` [N, T] that take part."""
        raise NotImplementedError

    def formula(self) -> str:
        """The sum over completions i and tokens t that stands before a token's term."""
        raise NotImplementedError


def _full(batch: Batch, value: float, dtype: torch.dtype) -> Tensor:
    return torch.full((len(batch.valid),), value, dtype=dtype, device=batch.valid.device)


@dataclass(frozen=True)
class TokenMean(Aggregate):
    """Every token of the batch counts the same (DAPO, arXiv:2503.14476, eq. 12)."""

    option: ClassVar[str] = "token_mean"

    def row_weights(self, batch: Batch, norm: Normalizer, dtype: torch.dtype) -> Tensor:
        return _full(batch, 1 / (norm.tokens or 1), dtype)

    def formula(self) -> str:
        return "1/(Σ_i T_i) Σ_i Σ_t"

    def code(self, term: str) -> str:
        return f"({term} * m).sum() / m.sum()"


@dataclass(frozen=True)
class SeqMeanTokenMean(Aggregate):
    """Every completion counts the same, its tokens share (GRPO, arXiv:2402.03300, eq. 3)."""

    option: ClassVar[str] = "seq_mean_token_mean"

    def row_weights(self, batch: Batch, norm: Normalizer, dtype: torch.dtype) -> Tensor:
        return 1 / ((norm.sequences or 1) * batch.lengths.clamp(min=1).to(dtype))

    def formula(self) -> str:
        return "1/N Σ_i 1/T_i Σ_t"

    def code(self, term: str) -> str:
        return f"(({term} * m).sum(1) / T.clamp(min=1)).sum() / m.any(1).sum()"


@dataclass(frozen=True)
class SeqMeanTokenSum(Aggregate):
    """Tokens summed, completions averaged: the book's -mean_x Σ_t (eq. 4.44)."""

    option: ClassVar[str] = "seq_mean_token_sum"

    def row_weights(self, batch: Batch, norm: Normalizer, dtype: torch.dtype) -> Tensor:
        return _full(batch, 1 / (norm.sequences or 1), dtype)

    def formula(self) -> str:
        return "1/N Σ_i Σ_t"

    def code(self, term: str) -> str:
        return f"({term} * m).sum() / m.any(1).sum()"


@dataclass(frozen=True)
class SeqMeanTokenSumNorm(Aggregate):
    """Tokens summed and divided by a constant length, completions averaged (Dr. GRPO, arXiv:2503.20783)."""

    option: ClassVar[str] = "seq_mean_token_sum_norm"
    max_length: int | None = param(
        "max_length", None, "token limit L of a completion (training fills it in)", above=0, required=True
    )

    def row_weights(self, batch: Batch, norm: Normalizer, dtype: torch.dtype) -> Tensor:
        return _full(batch, 1 / ((norm.sequences or 1) * self.given("max_length")), dtype)

    def formula(self) -> str:
        return f"1/(N·{symbol(self.max_length, 'L')}) Σ_i Σ_t"

    def code(self, term: str) -> str:
        return f"({term} * m).sum() / (m.any(1).sum() * {self.max_length})"


@dataclass(frozen=True)
class TokenSum(Aggregate):
    """The plain sum: no normalizer, so the loss grows with the batch."""

    option: ClassVar[str] = "token_sum"

    def row_weights(self, batch: Batch, norm: Normalizer, dtype: torch.dtype) -> Tensor:
        return _full(batch, 1.0, dtype)

    def formula(self) -> str:
        return "Σ_i Σ_t"

    def code(self, term: str) -> str:
        return f"({term} * m).sum()"


@dataclass(frozen=True)
class PromptMean(Aggregate):
    """Every prompt counts the same, the tokens of its completions share."""

    option: ClassVar[str] = "prompt_mean"
    coupling: ClassVar[str] = "group"
    needs: ClassVar[frozenset[str]] = frozenset({"group"})

    def row_weights(self, batch: Batch, norm: Normalizer, dtype: torch.dtype) -> Tensor:
        group = batch.require("group", "aggregate='prompt_mean'")
        lengths = batch.lengths.to(dtype)
        tokens = Groups.of(lengths, group, batch.live).total(lengths)
        return 1 / ((norm.groups or 1) * tokens.clamp(min=1))

    def formula(self) -> str:
        return "1/#g Σ_g 1/(Σ_{i∈g} T_i) Σ_{i∈g} Σ_t"

    def code(self, term: str) -> str:
        return f"(({term} * m).sum(1) / sum_g(m.sum(1) * 1.0).clamp(min=1)).sum() / group[m.any(1)].unique().numel()"


AGGREGATE: dict[str, type[Aggregate]] = options(*pieces_in(Aggregate, globals()))

"""Ratio: how far the policy has moved from the old policy, per token or per completion.

Every ratio is exp of a log-ratio clamped to ±20, and the clamp has zero gradient outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.losses.batch import Batch
from lossmith.losses.piece import Piece, options, param, pieces_in

__all__ = ["RATIO", "Ratio", "SequenceRatio", "SequenceSumRatio", "SequenceTokenRatio", "TokenRatio"]

LOG_RATIO_BOUND = 20.0


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of the log-ratio clamped to ±20."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def _inside(log_ratio: Tensor) -> Tensor:
    return (log_ratio.abs() <= LOG_RATIO_BOUND).to(log_ratio.dtype)


@dataclass(frozen=True)
class Ratio(Piece):
    """log-probabilities -> ratio [N, T]."""

    per_sequence: ClassVar[bool] = False  # one number a completion, broadcast to its tokens

    denominator: str = param(
        "denominator",
        "old",
        "policy the ratio is taken against (self: ratio 1 with gradient)",
        choices=("old", "behavior", "self", "ref"),
    )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        field = {"behavior": "behavior_logp", "ref": "ref_logp"}.get(self.denominator)
        return frozenset({field} if field else ())

    @property
    def stops_gradient(self) -> bool:  # type: ignore[override]
        return self.denominator == "self"

    def log_ratio(self, batch: Batch) -> Tensor:
        """Δ [N, T], with gradient; 0 at masked positions."""
        logp = batch.require("logp", "every policy loss")
        return logp - self.denominator_logp(batch)  # a batch holds 0 at masked positions of both

    def denominator_logp(self, batch: Batch) -> Tensor:
        """Log-probability under the denominator's policy, [N, T], detached."""
        if self.denominator == "behavior":
            return batch.require("behavior_logp", "denominator='behavior'").detach()
        if self.denominator == "ref":
            return batch.require("ref_logp", "denominator='ref'").detach()
        if self.denominator == "self":
            return batch.require("logp", "every policy loss").detach()
        return batch.old("every policy loss")

    def __call__(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def chain(self, slope: Tensor, batch: Batch) -> Tensor:
        """Given dL/dℓ-weighted slopes w.r.t. log r at each token [N, T], the closed-form dL/dlogp [N, T]."""
        raise NotImplementedError

    def formula(self) -> str:
        """r."""
        raise NotImplementedError

    def code(self) -> list[str]:
        """Lines of plain torch that compute r [N, T] from logp and denominator_logp."""
        raise NotImplementedError

    def under(self, at: str) -> str:
        """The probability in the denominator, of the token or the completion `at`, "y_t" or "y"."""
        policy = {"old": "π_old", "behavior": "μ", "ref": "π_ref"}.get(self.denominator)
        return f"{policy}({at})" if policy else f"sg(π_θ({at}))"


@dataclass(frozen=True)
class TokenRatio(Ratio):
    """r_t = π_θ(y_t) / π_old(y_t)."""

    option: ClassVar[str] = "token"

    def __call__(self, batch: Batch) -> Tensor:
        return bounded_exp(self.log_ratio(batch))

    def chain(self, slope: Tensor, batch: Batch) -> Tensor:
        return slope * _inside(self.log_ratio(batch).detach())

    def formula(self) -> str:
        return f"π_θ(y_t) / {self.under('y_t')}"

    def code(self) -> list[str]:
        return ["r = torch.exp(logp - denominator_logp)"]


class _PerSequence(Ratio):
    per_sequence: ClassVar[bool] = True
    coupling: ClassVar[str] = "sequence"

    def _level(self, batch: Batch) -> Tensor:
        """log of the completion's ratio, [N, 1]."""
        raise NotImplementedError

    def __call__(self, batch: Batch) -> Tensor:
        return bounded_exp(self._level(batch)).expand(batch.valid.shape)


@dataclass(frozen=True)
class SequenceRatio(_PerSequence):
    """s_i = exp(mean_t log r_t), the geometric mean over the completion (GSPO, arXiv:2507.18071, eq. 7)."""

    option: ClassVar[str] = "sequence"

    def _level(self, batch: Batch) -> Tensor:
        return self.log_ratio(batch).sum(1, keepdim=True) / batch.lengths.clamp(min=1)[:, None]

    def chain(self, slope: Tensor, batch: Batch) -> Tensor:
        total = (slope * batch.valid).sum(1, keepdim=True) / batch.lengths.clamp(min=1)[:, None]
        return total * _inside(self._level(batch).detach()) * batch.valid

    def formula(self) -> str:
        return f"(π_θ(y) / {self.under('y')})^(1/T)"

    def code(self) -> list[str]:
        return [
            "s = torch.exp(((logp - denominator_logp) * mask).sum(1, keepdim=True) / T[:, None])",
            "r = s.expand(mask.shape)",
        ]


@dataclass(frozen=True)
class SequenceTokenRatio(Ratio):
    """Value s_i, gradient of the token: sg(s_i)·exp(logp - sg(logp)) (GSPO-token, arXiv:2507.18071, eq. 14)."""

    option: ClassVar[str] = "sequence_token"
    stops_gradient: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Tensor:
        delta = self.log_ratio(batch)
        level = SequenceRatio(self.denominator)._level(batch).detach()
        return bounded_exp(level) * torch.exp(delta - delta.detach())

    def chain(self, slope: Tensor, batch: Batch) -> Tensor:
        return slope * batch.valid

    def formula(self) -> str:
        return f"sg((π_θ(y) / {self.under('y')})^(1/T))·π_θ(y_t)/sg(π_θ(y_t))"

    def code(self) -> list[str]:
        return [
            "s = torch.exp(((logp - denominator_logp) * mask).sum(1, keepdim=True) / T[:, None])",
            "r = s.detach() * torch.exp(logp - logp.detach())",
        ]


@dataclass(frozen=True)
class SequenceSumRatio(_PerSequence):
    """S_i = Π_t r_t, the ratio of whole completions (the trajectory ratio of the book's eq. 4.47; RLOO in TRL)."""

    option: ClassVar[str] = "sequence_sum"

    def _level(self, batch: Batch) -> Tensor:
        return self.log_ratio(batch).sum(1, keepdim=True)

    def chain(self, slope: Tensor, batch: Batch) -> Tensor:
        total = (slope * batch.valid).sum(1, keepdim=True)
        return total * _inside(self._level(batch).detach()) * batch.valid

    def formula(self) -> str:
        return f"π_θ(y) / {self.under('y')}"

    def code(self) -> list[str]:
        return ["r = torch.exp(((logp - denominator_logp) * mask).sum(1, keepdim=True)).expand(mask.shape)"]


RATIO: dict[str, type[Ratio]] = options(*pieces_in(Ratio, globals()))

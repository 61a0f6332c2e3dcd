"""Divergences of the policy from a teacher over the vocabulary: distillation with every token's probability.

q = π_θ(·|y_<t) and p = π_T(·|y_<t) are rows of log-probabilities, [..., V]. Whoever has the models computes `at` chunk
by chunk and gives the result as Batch.divergence; a batch that holds both rows needs nobody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lossmith.errors import LossError
from lossmith.losses.axes.extra.base import Extra
from lossmith.losses.batch import Batch
from lossmith.losses.piece import number, param

__all__ = ["JSD", "Divergence", "ForwardKL", "ReverseKL", "SkewKL", "SkewReverseKL"]

_LEAST_REST = -1e-7  # log of the share of the chosen tokens is taken no closer to 0: what is left has a logarithm


def _coef() -> float:
    coef: float = param("distil_coef", 1.0, "coefficient of the divergence from the teacher", low=0)
    return coef


def _top_k() -> int:
    doc = "only the k likeliest tokens, in place of the vocabulary; 0: all of it"
    top_k: int = param("distil_top_k", 0, doc, low=0)
    return top_k


def _support() -> str:
    doc = "whose likeliest tokens those k are"
    support: str = param("distil_support", "policy", doc, choices=("policy", "teacher"))
    return support


def _tail() -> bool:
    doc = "with distil_top_k: the other tokens are one more, and not left out"
    tail: bool = param("distil_tail", True, doc)
    return tail


class Divergence(Extra):
    """distil_coef·D(q, p) at every valid token."""

    through: ClassVar[str] = "vocab_logp"
    needs: ClassVar[frozenset[str]] = frozenset({"vocab_logp", "teacher_vocab_logp"})
    looks_at: ClassVar[frozenset[str]] = frozenset({"divergence"})
    coef: float
    top_k: int
    support: str
    tail: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.top_k and (self.support != "policy" or not self.tail):
            raise LossError(
                "distil_support and distil_tail say which are the likeliest tokens and what becomes of the others: "
                "give distil_top_k, how many these are."
            )

    # -- what a divergence says ------------------------------------------------------------------------------------

    def between(self, q: Tensor, p: Tensor) -> Tensor:
        """D of two rows of log-probabilities [..., V], nats [...]."""
        raise NotImplementedError

    def between_slope(self, q: Tensor, p: Tensor) -> Tensor:
        """dD/d log q_v [..., V], every log q_v a number of its own."""
        raise NotImplementedError

    def between_text(self) -> str:
        """D as Σ_v of the probabilities that both give to a token v, π_θ(v) and π_T(v)."""
        raise NotImplementedError

    def between_code(self) -> str:
        """D in plain torch, from log_q and log_p [N, T, V]."""
        raise NotImplementedError

    # -- what follows ----------------------------------------------------------------------------------------------

    def at(self, policy: Tensor, teacher: Tensor) -> Tensor:
        """D [...] of log-probabilities [..., V] over the vocabulary, on the tokens that count. Gradient into both."""
        kept = self._kept(policy, teacher)
        return self.between(self._on(policy, kept), self._on(teacher, kept))

    def slope_at(self, policy: Tensor, teacher: Tensor) -> Tensor:
        """dD/d log π_θ(v), [..., V]."""
        kept = self._kept(policy, teacher)
        slope = self.between_slope(self._on(policy, kept), self._on(teacher, kept))
        if kept is None:
            return slope
        return torch.zeros_like(policy).scatter(-1, kept, self._back(policy.gather(-1, kept), slope))

    def _kept(self, policy: Tensor, teacher: Tensor) -> Tensor | None:
        """Numbers of the chosen tokens, [..., k]; None: all."""
        if not self.top_k:
            return None
        ranked = policy if self.support == "policy" else teacher
        return ranked.detach().topk(min(self.top_k, ranked.shape[-1]), dim=-1).indices

    def _on(self, logp: Tensor, kept: Tensor | None) -> Tensor:
        """The distribution over the chosen tokens: with the rest as one more, or as if there were no rest."""
        if kept is None:
            return logp
        chosen = logp.gather(-1, kept)
        share = chosen.logsumexp(-1, keepdim=True)
        if not self.tail:
            return chosen - share
        return torch.cat([chosen, torch.log(-torch.expm1(share.clamp(max=_LEAST_REST)))], -1)

    def _back(self, chosen: Tensor, slope: Tensor) -> Tensor:
        """From slopes of that distribution to slopes of the chosen tokens' log-probabilities."""
        share = chosen.logsumexp(-1, keepdim=True)
        if not self.tail:
            return slope - (chosen - share).exp() * slope.sum(-1, keepdim=True)
        of_rest = -chosen.exp() / -torch.expm1(share.clamp(max=_LEAST_REST))
        return slope[..., :-1] + torch.where(share <= _LEAST_REST, of_rest, 0.0) * slope[..., -1:]

    def value(self, batch: Batch, advantage: Tensor) -> Tensor:
        found = batch.divergence if batch.divergence is not None else self.at(*self._rows(batch))
        return self.coef * found

    def slope(self, batch: Batch, advantage: Tensor) -> Tensor:
        return torch.zeros_like(advantage)

    @torch.no_grad()
    def vocabulary_slope(self, batch: Batch) -> Tensor:
        return self.coef * self.slope_at(*self._rows(batch))

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        owner = f"extra='{self.option}'"
        policy = batch.require("vocab_logp", owner)
        teacher = batch.require("teacher_vocab_logp", owner).detach()
        if policy.shape != teacher.shape:
            raise LossError(
                f"{owner}: Batch.vocab_logp has {policy.shape[-1]} tokens and teacher_vocab_logp {teacher.shape[-1]}. "
                "Give both over the same tokens, in the same order."
            )
        return policy, teacher

    def formula(self) -> str:
        text = self.between_text() if self.coef == 1 else f"{number(self.coef)}·{self.between_text()}"
        if not self.top_k:
            return text
        ranked = {"policy": "π_θ(v)", "teacher": "π_T(v)"}[self.support]
        chosen = f"S = likeliest({self.top_k}, {ranked}{', rest' if self.tail else ''})"
        return f"{text.replace('Σ_v', 'Σ_{v∈S}')}{'; ' if ' where ' in text else ' where '}{chosen}"

    def code(self) -> list[str]:
        lines = ["log_q, log_p = vocab_logp, teacher_vocab_logp"]
        if self.top_k:
            ranked = {"policy": "log_q", "teacher": "log_p"}[self.support]
            lines += [
                f"kept = {ranked}.detach().topk(min({self.top_k}, {ranked}.shape[-1]), -1).indices",
                "log_q, log_p = log_q.gather(-1, kept), log_p.gather(-1, kept)",
            ]
            if self.tail:
                left = f"(1 - x.exp().sum(-1, keepdim=True)).clamp(min={-math.expm1(_LEAST_REST)})"
                lines.append(f"log_q, log_p = (torch.cat([x, {left}.log()], -1) for x in (log_q, log_p))")
            else:
                lines.append("log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)")
        return [*lines, f"loss = loss + {self.coef} * ({self.between_code()}).sum(-1)"]


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q‖p) = Σ_v q_v (log q_v - log p_v): the policy puts no mass where the teacher has none (arXiv:2306.08543)."""

    option: ClassVar[str] = "reverse_kl"
    coef: float = _coef()
    top_k: int = _top_k()
    support: str = _support()
    tail: bool = _tail()

    def between(self, q: Tensor, p: Tensor) -> Tensor:
        return (q.exp() * (q - p)).sum(-1)

    def between_slope(self, q: Tensor, p: Tensor) -> Tensor:
        return q.exp() * (q - p + 1)

    def between_text(self) -> str:
        return "Σ_v π_θ(v)·(log π_θ(v) − log π_T(v))"

    def between_code(self) -> str:
        return "log_q.exp() * (log_q - log_p)"


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p‖q) = Σ_v p_v (log p_v - log q_v): the policy covers what the teacher does (arXiv:1503.02531)."""

    option: ClassVar[str] = "forward_kl"
    coef: float = _coef()
    top_k: int = _top_k()
    support: str = _support()
    tail: bool = _tail()

    def between(self, q: Tensor, p: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1)

    def between_slope(self, q: Tensor, p: Tensor) -> Tensor:
        return -p.exp()

    def between_text(self) -> str:
        return "Σ_v π_T(v)·(log π_T(v) − log π_θ(v))"

    def between_code(self) -> str:
        return "log_p.exp() * (log_p - log_q)"


def _mixed(q: Tensor, p: Tensor, share: float) -> Tensor:
    """log(share·p + (1 - share)·q)."""
    return torch.logaddexp(p + math.log(share), q + math.log1p(-share))


@dataclass(frozen=True)
class JSD(Divergence):
    """β·KL(p‖m) + (1 - β)·KL(q‖m), m = βp + (1 - β)q: the generalized Jensen-Shannon divergence (arXiv:2306.13649).

    Divided by β it tends to the forward KL as β goes to 0; divided by 1 - β, to the reverse KL as β goes to 1.
    Libraries write forward and reverse KL as β = 0 and β = 1: here these are extra='forward_kl' and 'reverse_kl'.
    """

    option: ClassVar[str] = "jsd"
    coef: float = _coef()
    beta: float = param("jsd_beta", 0.5, "share of the teacher in the mixture, above 0 and below 1", above=0, high=1)
    top_k: int = _top_k()
    support: str = _support()
    tail: bool = _tail()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta == 1:
            raise LossError(
                "JSD.beta (flat name jsd_beta) is 1, but must be below 1. What libraries write as beta = "
                "1 is the reverse KL: extra='reverse_kl' (and beta = 0 extra='forward_kl')."
            )

    def between(self, q: Tensor, p: Tensor) -> Tensor:
        m, b = _mixed(q, p, self.beta), self.beta
        return (b * p.exp() * (p - m) + (1 - b) * q.exp() * (q - m)).sum(-1)

    def between_slope(self, q: Tensor, p: Tensor) -> Tensor:
        return (1 - self.beta) * q.exp() * (q - torch.log(self.beta * p.exp() + (1 - self.beta) * q.exp()))

    def between_text(self) -> str:
        b, rest = number(self.beta), number(1 - self.beta)
        parts = f"{b}·π_T(v)·(log π_T(v) − log M_v) + {rest}·π_θ(v)·(log π_θ(v) − log M_v)"
        return f"Σ_v ({parts}) where M_v = {b}·π_T(v) + {rest}·π_θ(v)"

    def between_code(self) -> str:
        b = self.beta
        m = f"torch.log({b} * log_p.exp() + (1 - {b}) * log_q.exp())"
        return f"{b} * log_p.exp() * (log_p - {m}) + (1 - {b}) * log_q.exp() * (log_q - {m})"


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p‖αp + (1 - α)q): the forward KL with some of the teacher mixed into the policy (arXiv:2402.03898)."""

    option: ClassVar[str] = "skew_kl"
    coef: float = _coef()
    skew: float = param("skew", 0.1, "share that is mixed in, above 0 and below 1", above=0, high=1)
    top_k: int = _top_k()
    support: str = _support()
    tail: bool = _tail()

    def __post_init__(self) -> None:
        super().__post_init__()
        _below_one(self.skew)

    def between(self, q: Tensor, p: Tensor) -> Tensor:
        return (p.exp() * (p - _mixed(q, p, self.skew))).sum(-1)

    def between_slope(self, q: Tensor, p: Tensor) -> Tensor:
        part = (1 - self.skew) * q.exp()
        return -p.exp() * part / (self.skew * p.exp() + part)

    def between_text(self) -> str:
        a, rest = number(self.skew), number(1 - self.skew)
        return f"Σ_v π_T(v)·(log π_T(v) − log({a}·π_T(v) + {rest}·π_θ(v)))"

    def between_code(self) -> str:
        a = self.skew
        return f"log_p.exp() * (log_p - torch.log({a} * log_p.exp() + (1 - {a}) * log_q.exp()))"


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q‖(1 - α)p + αq): the reverse KL with some of the policy mixed into the teacher (arXiv:2402.03898)."""

    option: ClassVar[str] = "skew_reverse_kl"
    coef: float = _coef()
    skew: float = param("skew", 0.1, "share that is mixed in, above 0 and below 1", above=0, high=1)
    top_k: int = _top_k()
    support: str = _support()
    tail: bool = _tail()

    def __post_init__(self) -> None:
        super().__post_init__()
        _below_one(self.skew)

    def between(self, q: Tensor, p: Tensor) -> Tensor:
        return (q.exp() * (q - _mixed(p, q, self.skew))).sum(-1)

    def between_slope(self, q: Tensor, p: Tensor) -> Tensor:
        mixture = (1 - self.skew) * p.exp() + self.skew * q.exp()
        return q.exp() * (q - torch.log(mixture) + 1 - self.skew * q.exp() / mixture)

    def between_text(self) -> str:
        a, rest = number(self.skew), number(1 - self.skew)
        return f"Σ_v π_θ(v)·(log π_θ(v) − log({rest}·π_T(v) + {a}·π_θ(v)))"

    def between_code(self) -> str:
        a = self.skew
        return f"log_q.exp() * (log_q - torch.log((1 - {a}) * log_p.exp() + {a} * log_q.exp()))"


def _below_one(skew: float) -> None:
    if skew == 1:
        raise LossError("skew is 1, but must be below 1: with 1 both sides are the same distribution.")

"""Which distribution a log-probability belongs to. Sampler and learner use the same function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossmith.errors import PolicyError

__all__ = ["SamplingSettings", "accumulation_dtype", "log_softmax_under"]

_HEAD = 1024  # how many of the likeliest tokens are sorted before the whole vocabulary is


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled: temperature first, then top-k, then top-p, then renormalized."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise PolicyError(
                f"temperature = {self.temperature}, but must be finite and at least 0 (0 takes the likeliest token)."
            )
        if not 0 < self.top_p <= 1:
            raise PolicyError(f"top_p = {self.top_p}, but must be above 0 and at most 1 (1 is off).")
        if self.top_k < 0:
            raise PolicyError(f"top_k = {self.top_k}, but must be at least 0 (0 is off).")
        if self.max_tokens < 1:
            raise PolicyError(f"max_tokens = {self.max_tokens}, but a completion needs at least 1 token.")
        if any(not text for text in self.stop):
            raise PolicyError("stop holds an empty string, which every completion contains from its start.")

    @property
    def filtered(self) -> bool:
        return self.top_p < 1 or self.top_k > 0

    @property
    def greedy(self) -> str:
        """The setting with which nearly every token is the likeliest one, so that completions are copies; or "".

        A token that is half as likely as the likeliest is drawn once in 10^30 times at temperature 0.01. top_p = 0.01
        keeps one token wherever that has a hundredth of the probability.
        """
        if self.temperature <= 0.01:
            return f"temperature = {self.temperature:g}"
        return "top_k = 1" if self.top_k == 1 else f"top_p = {self.top_p:g}" if self.top_p <= 0.01 else ""

    @property
    def noise(self) -> str:
        """The setting with which tokens are drawn nearly evenly, whatever the model says; or ""."""
        return f"temperature = {self.temperature:g}" if self.temperature > 10 else ""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type for sums and exponentials of numbers of this type: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_softmax_under(
    logits: Tensor,
    settings: SamplingSettings,
    keep: Tensor | None = None,
    kept: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Log-probabilities [M, V] of the distribution that is sampled from, given raw logits [M, V] (float32 or wider).

    keep [M]: ids that stay in the support whatever the filters say. The learner passes the sampled tokens, so that a
    policy that has moved still gives them a finite log-probability. The support is chosen from the given logits, and
    no gradient passes through the choice. kept: the support of each row, where the sampler has said what it chose from;
    the two distributions are then over the same tokens, whatever rounding says. Temperature 0 is refused: its
    distribution has no logarithm to train on.
    """
    if settings.temperature == 0:
        raise PolicyError("temperature = 0 has no log-probabilities: sample with a temperature above 0.")
    scaled = logits if settings.temperature == 1 else logits / settings.temperature
    if settings.filtered:
        support = _support(scaled.detach(), settings) if kept is None else _given(scaled, kept)
        if keep is not None:
            support = support.scatter(1, keep[:, None], True)
        scaled = scaled.masked_fill(~support, -torch.inf)
    return torch.log_softmax(scaled, dim=-1)


def _given(scaled: Tensor, kept: Sequence[Sequence[int]]) -> Tensor:
    """[M, V] bool: True at these ids."""
    support = torch.zeros(scaled.shape, dtype=torch.bool, device=scaled.device)
    rows = torch.repeat_interleave(torch.tensor([len(ids) for ids in kept]))
    support[rows.to(scaled.device), torch.tensor([i for ids in kept for i in ids], device=scaled.device)] = True
    return support


def _support(scaled: Tensor, settings: SamplingSettings) -> Tensor:
    """[M, V] bool: what top-k and then top-p leave. The likeliest token always stays.

    Tokens as likely as the last one that stays do too, so that the support depends on nothing but the values: logits
    out of a bfloat16 product are often equal.
    """
    edge = torch.full_like(scaled[:, :1], -torch.inf)
    if settings.top_k:
        edge = scaled.topk(min(settings.top_k, scaled.shape[1]), sorted=True).values[:, -1:]
    if settings.top_p < 1:
        total = scaled.masked_fill(scaled < edge, -torch.inf).logsumexp(-1, keepdim=True)
        edge = torch.maximum(edge, _nucleus_edge(scaled, total, settings.top_p, _HEAD))
    return scaled >= edge


def _nucleus_edge(scaled: Tensor, total: Tensor, top_p: float, head: int) -> Tensor:
    """[M, 1]: the least value in the smallest set of tokens with probability top_p, of probabilities exp(x - total).

    It is looked for among the `head` largest values, and among all only in rows where those do not reach top_p:
    sorting a whole vocabulary takes longer than everything else in a decoding step.
    """
    values = scaled.topk(min(head, scaled.shape[1]), sorted=True).values
    probabilities = (values - total).exp()
    inside = probabilities.cumsum(-1) - probabilities < top_p  # the mass before a token is still short of top_p
    edge = values.gather(1, inside.sum(-1, keepdim=True) - 1)
    wider = inside[:, -1]
    if head < scaled.shape[1] and wider.any():
        edge[wider] = _nucleus_edge(scaled[wider], total[wider], top_p, scaled.shape[1])
    return edge

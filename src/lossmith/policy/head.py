"""The head: log-probabilities of given tokens from last hidden states, without ever holding the logits of all of them.

Logits are made chunk by chunk, in buffers that are used again. Their slopes are kept for the backward pass where they
are few, as in a micro-batch on a CPU, and made once more where they are many. This is the plain case (one linear layer,
a temperature); filters, entropies and full-vocabulary KL take the general way in `log_probs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.policy.distribution import SamplingSettings, wide
from lossmith.policy.load import Policy

__all__ = ["chosen_log_probs", "head_is_plain"]

_ROWS = 32  # rows whose logits are turned into probabilities at a time: few enough to stay in the processor's cache
_KEPT = 256 << 20  # bytes of slopes that are kept at most


def head_is_plain(policy: Policy, settings: SamplingSettings) -> bool:
    """Whether the logits are one linear layer of the hidden states, and every token is in the support."""
    config = policy.model.config.get_text_config()
    odd = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    if type(policy.model.get_output_embeddings()) is not nn.Linear or settings.filtered or settings.temperature == 0:
        return False
    return not any(getattr(config, name, None) for name in odd)


def chosen_log_probs(policy: Policy, hidden: Tensor, ids: Tensor, settings: SamplingSettings, chunk: int) -> Tensor:
    """[M, H] hidden states and [M] ids -> [M] log-probabilities in nats, with gradient."""
    head = policy.model.get_output_embeddings()
    narrow = policy.compute_dtype if policy.compute_dtype == torch.bfloat16 else head.weight.dtype
    few = len(ids) * len(head.weight) * narrow.itemsize <= _KEPT
    way = _KeptSlopes if few and torch.is_grad_enabled() else _RemadeSlopes
    found: Tensor = way.apply(hidden, head.weight, head.bias, _Task(ids, settings.temperature, narrow, chunk))
    return found


@dataclass(frozen=True)
class _Task:
    """What is asked of the head, beside its tensors with gradient."""

    ids: Tensor  # [M]
    temperature: float
    narrow: torch.dtype  # of the products
    chunk: int  # rows of a product


class _KeptSlopes(torch.autograd.Function):
    """log softmax(h W^T / temperature)[id], its slopes in the logits kept in the place of the logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(task.narrow), weight.to(task.narrow)
            logp = torch.empty(len(h), dtype=wide(h.dtype), device=h.device)
            kept = torch.empty(len(h), len(w), dtype=h.dtype, device=h.device)
            for rows, logits in _logits(h, w, bias, task, kept):
                chosen = task.ids[rows, None]
                found, _, total = _exponentials_(logits, chosen)
                logp[rows] = found[:, 0]
                logits.div_(total).scatter_add_(1, chosen, torch.full_like(total, -1.0))
                kept[rows] = logits  # p - 1 for the chosen token, p for the others: the negative slope
        ctx.save_for_backward(h, weight, bias, kept)
        ctx.temperature, ctx.dtype = task.temperature, hidden.dtype
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, kept = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            pull = (grad / -ctx.temperature).to(wide(h.dtype))[:, None]
            dh = (kept @ weight.to(h.dtype)).to(ctx.dtype).mul_(pull)
            dw = db = None
            if ctx.needs_input_grad[1]:
                dw = (kept.t() @ (h * pull).to(h.dtype)).to(weight.dtype)
            if bias is not None and ctx.needs_input_grad[2]:
                db = (pull.to(h.dtype).t() @ kept)[0].to(bias.dtype)
        return dh, dw, db, None


class _RemadeSlopes(torch.autograd.Function):
    """log softmax(h W^T / temperature)[id], the logits made once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(task.narrow), weight.to(task.narrow)
            sums = torch.empty(len(h), dtype=wide(h.dtype), device=h.device)
            logp = torch.empty_like(sums)
            for rows, logits in _logits(h, w, bias, task):
                found, most, total = _exponentials_(logits, task.ids[rows, None])
                logp[rows], sums[rows] = found[:, 0], (total.log_() + most)[:, 0]
        ctx.save_for_backward(h, weight, bias, sums)
        ctx.task, ctx.dtype = task, hidden.dtype
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, sums = ctx.saved_tensors
        ids, chunk = ctx.task.ids, ctx.task.chunk
        with torch.autocast(h.device.type, enabled=False):
            w = weight.to(h.dtype)
            pull = (grad / ctx.task.temperature).to(sums.dtype)
            dw = torch.zeros_like(weight, dtype=sums.dtype) if ctx.needs_input_grad[1] else None
            db = torch.zeros_like(bias, dtype=sums.dtype) if bias is not None and ctx.needs_input_grad[2] else None
            dh = torch.empty_like(h)
            slopes = torch.empty(min(chunk, len(ids)), len(w), dtype=h.dtype, device=h.device)
            for rows, logits in _logits(h, w, bias, ctx.task):
                at = rows.start % chunk
                slope = logits.sub_(sums[rows, None]).exp_().mul_(-pull[rows, None])
                slope.scatter_add_(1, ids[rows, None], pull[rows, None])
                slopes[at : at + len(slope)] = slope
                if db is not None:
                    db += slope.sum(0)
                if rows.stop % chunk == 0 or rows.stop == len(ids):  # the chunk is complete
                    whole = slice(rows.stop - at - len(slope), rows.stop)
                    part = slopes[: at + len(slope)]
                    torch.mm(part, w, out=dh[whole])
                    if dw is not None:
                        dw += part.t() @ h[whole]
        return dh.to(ctx.dtype), None if dw is None else dw.to(weight.dtype), db, None


def _exponentials_(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [R, V] become exp(logits - their largest), in place; chosen [R, 1].

    Returns [R, 1] each: log-probabilities of the chosen, the largest logits, the sums of the exponentials. With and
    without gradient they must be the same to the bit, so that a reference equal to the policy is at distance 0.
    """
    most = logits.amax(1, keepdim=True)
    at = logits.sub_(most).gather(1, chosen)
    total = logits.exp_().sum(1, keepdim=True)
    return at - total.log(), most, total


def _logits(
    h: Tensor, w: Tensor, bias: Tensor | None, task: _Task, into: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits [R, V] over the temperature) in float32 or wider. The buffer is the next piece's too.

    into [M, V]: where the products themselves are left; without it they share a chunk's memory.
    """
    size = min(task.chunk, len(h))
    raw = torch.empty(size, len(w), dtype=h.dtype, device=h.device) if into is None else into
    room = torch.empty(min(_ROWS, size), len(w), dtype=wide(h.dtype), device=h.device)
    for start in range(0, len(h), task.chunk):
        stop = min(start + task.chunk, len(h))
        part = raw[: stop - start] if into is None else raw[start:stop]
        torch.mm(h[start:stop], w.t(), out=part)
        for first in range(start, stop, _ROWS):
            last = min(first + _ROWS, stop)
            logits = room[: last - first].copy_(part[first - start : last - start])
            if bias is not None:
                logits += bias
            yield slice(first, last), logits if task.temperature == 1 else logits.div_(task.temperature)

"""The head: log-probabilities of given tokens from last hidden states, without ever holding the logits of all of them.

Logits are computed chunk by chunk, in buffers that are used again. Their gradients are stored for the backward pass
where they are few, as in a micro-batch on a CPU; where they are many, the logits are computed a second time. This is
the plain case (one linear layer, a temperature); filters, entropies and full-vocabulary KL go through `log_probs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.policy.distribution import SamplingSettings, accumulation_dtype
from lossmith.policy.load import Policy

__all__ = ["STORED_BYTES", "chosen_log_probs", "head_is_plain"]

_ROWS = 32  # rows whose logits are turned into probabilities at a time: few enough to stay in the processor's cache
STORED_BYTES = 256 << 20  # of gradients of logits that are stored at most


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
    rounded = policy.compute_dtype == torch.bfloat16 and not policy.float32_head
    product_dtype = torch.bfloat16 if rounded else head.weight.dtype
    fits = len(ids) * len(head.weight) * product_dtype.itemsize <= STORED_BYTES
    function = _StoredLogitGradients if fits and torch.is_grad_enabled() else _RecomputedLogits
    logp: Tensor = function.apply(
        hidden, head.weight, head.bias, _Task(ids, settings.temperature, product_dtype, chunk)
    )
    return logp


@dataclass(frozen=True)
class _Task:
    """The arguments of the head that have no gradient."""

    ids: Tensor  # [M]
    temperature: float
    product_dtype: torch.dtype
    chunk: int  # rows of a product


class _StoredLogitGradients(torch.autograd.Function):
    """log softmax(h W^T / temperature)[id]; its gradient in the logits is stored in the place of the logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(task.product_dtype), weight.to(task.product_dtype)
            logp = torch.empty(len(h), dtype=accumulation_dtype(h.dtype), device=h.device)
            negative_gradients = torch.empty(len(h), len(w), dtype=h.dtype, device=h.device)
            for rows, logits in _logits(h, w, bias, task, negative_gradients):
                chosen = task.ids[rows, None]
                chosen_logp, _, total = _exponentials_(logits, chosen)
                logp[rows] = chosen_logp[:, 0]
                logits.div_(total).scatter_add_(1, chosen, torch.full_like(total, -1.0))
                negative_gradients[rows] = logits  # p - 1 for the chosen token, p for the others
        ctx.save_for_backward(h, weight, bias, negative_gradients)
        ctx.temperature, ctx.dtype = task.temperature, hidden.dtype
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, negative_gradients = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            row_scale = (grad / -ctx.temperature).to(accumulation_dtype(h.dtype))[:, None]
            dh = (negative_gradients @ weight.to(h.dtype)).to(ctx.dtype).mul_(row_scale)
            dw = db = None
            if ctx.needs_input_grad[1]:
                dw = (negative_gradients.t() @ (h * row_scale).to(h.dtype)).to(weight.dtype)
            if bias is not None and ctx.needs_input_grad[2]:
                db = (row_scale.to(h.dtype).t() @ negative_gradients)[0].to(bias.dtype)
        return dh, dw, db, None


class _RecomputedLogits(torch.autograd.Function):
    """log softmax(h W^T / temperature)[id]; the logits are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(task.product_dtype), weight.to(task.product_dtype)
            sums = torch.empty(len(h), dtype=accumulation_dtype(h.dtype), device=h.device)
            logp = torch.empty_like(sums)
            for rows, logits in _logits(h, w, bias, task):
                chosen_logp, largest, total = _exponentials_(logits, task.ids[rows, None])
                logp[rows], sums[rows] = chosen_logp[:, 0], (total.log_() + largest)[:, 0]
        ctx.save_for_backward(h, weight, bias, sums)
        ctx.task, ctx.dtype = task, hidden.dtype
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, sums = ctx.saved_tensors
        ids, chunk = ctx.task.ids, ctx.task.chunk
        with torch.autocast(h.device.type, enabled=False):
            w = weight.to(h.dtype)
            scaled_grad = (grad / ctx.task.temperature).to(sums.dtype)
            dw = torch.zeros_like(weight, dtype=sums.dtype) if ctx.needs_input_grad[1] else None
            db = torch.zeros_like(bias, dtype=sums.dtype) if bias is not None and ctx.needs_input_grad[2] else None
            dh = torch.empty_like(h)
            grad_logits = torch.empty(min(chunk, len(ids)), len(w), dtype=h.dtype, device=h.device)
            for rows, logits in _logits(h, w, bias, ctx.task):
                at = rows.start % chunk
                grad_part = logits.sub_(sums[rows, None]).exp_().mul_(-scaled_grad[rows, None])
                grad_part.scatter_add_(1, ids[rows, None], scaled_grad[rows, None])
                grad_logits[at : at + len(grad_part)] = grad_part
                if db is not None:
                    db += grad_part.sum(0)
                if rows.stop % chunk == 0 or rows.stop == len(ids):  # the chunk is complete
                    whole = slice(rows.stop - at - len(grad_part), rows.stop)
                    part = grad_logits[: at + len(grad_part)]
                    torch.mm(part, w, out=dh[whole])
                    if dw is not None:
                        dw += part.t() @ h[whole]
        return dh.to(ctx.dtype), None if dw is None else dw.to(weight.dtype), db, None


def _exponentials_(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [R, V] become exp(logits - their largest), in place; chosen [R, 1].

    Returns [R, 1] each: log-probabilities of the chosen, the largest logits, the sums of the exponentials. With and
    without gradient they must be the same to the bit, so that a reference equal to the policy is at distance 0.
    """
    largest = logits.amax(1, keepdim=True)
    shifted = logits.sub_(largest).gather(1, chosen)
    total = logits.exp_().sum(1, keepdim=True)
    return shifted - total.log(), largest, total


def _logits(
    h: Tensor, w: Tensor, bias: Tensor | None, task: _Task, out: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits [R, V] over the temperature) in float32 or wider. The buffer is the next piece's too.

    out [M, V]: where the products themselves are left; without it they share a chunk's memory.
    """
    size = min(task.chunk, len(h))
    products = torch.empty(size, len(w), dtype=h.dtype, device=h.device) if out is None else out
    buffer = torch.empty(min(_ROWS, size), len(w), dtype=accumulation_dtype(h.dtype), device=h.device)
    for start in range(0, len(h), task.chunk):
        stop = min(start + task.chunk, len(h))
        part = products[: stop - start] if out is None else products[start:stop]
        torch.mm(h[start:stop], w.t(), out=part)
        for first in range(start, stop, _ROWS):
            last = min(first + _ROWS, stop)
            logits = buffer[: last - first].copy_(part[first - start : last - start])
            if bias is not None:
                logits += bias
            yield slice(first, last), logits if task.temperature == 1 else logits.div_(task.temperature)

"""The head: log-probabilities of given tokens from last hidden states, without ever holding the logits of all of them.

Logits are made chunk by chunk, in buffers that are used again. Their slopes are kept for the backward pass where they
are few, as in a micro-batch on a CPU, and made once more where they are many. This is the plain case (one linear layer,
a temperature); filters, entropies and full-vocabulary KL take the general way in `log_probs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.policy.load import Policy
from lossmith.policy.measure import SamplingSettings, wide

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
    way = _KeptSlopes if few and torch.is_grad_enabled() else _ChosenLogProbs
    found: Tensor = way.apply(hidden, head.weight, head.bias, ids, settings.temperature, narrow, chunk)
    return found


class _KeptSlopes(torch.autograd.Function):
    """log softmax(h W^T / temperature)[id], its slopes in the logits kept in the place of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        narrow: torch.dtype,
        chunk: int,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(narrow), weight.to(narrow)
            logp = torch.empty(len(ids), dtype=wide(narrow), device=hidden.device)
            kept = torch.empty(len(ids), len(w), dtype=narrow, device=hidden.device)
            for rows, logits in _logits(h, w, bias, temperature, chunk, kept):
                chosen = ids[rows, None]
                logits.sub_(logits.amax(1, keepdim=True))
                at = logits.gather(1, chosen)
                total = logits.exp_().sum(1, keepdim=True)
                logp[rows] = (at - total.log())[:, 0]
                logits.div_(total).scatter_add_(1, chosen, torch.full_like(at, -1.0))
                kept[rows] = logits  # p - 1 for the chosen token, p for the others: the negative slope
        ctx.save_for_backward(h, weight, bias, kept)
        ctx.given = (temperature, narrow, hidden.dtype)
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, kept = ctx.saved_tensors
        temperature, narrow, dtype = ctx.given
        with torch.autocast(h.device.type, enabled=False):
            pull = (grad / -temperature).to(wide(narrow))[:, None]
            dh = (kept @ weight.to(narrow)).to(dtype).mul_(pull)
            dw = (kept.t() @ (h * pull).to(narrow)).to(weight.dtype) if ctx.needs_input_grad[1] else None
            db = (
                (pull.to(narrow).t() @ kept)[0].to(bias.dtype) if bias is not None and ctx.needs_input_grad[2] else None
            )
        return dh, dw, db, None, None, None, None


class _ChosenLogProbs(torch.autograd.Function):
    """log softmax(h W^T / temperature)[id], the logits made once more in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        narrow: torch.dtype,
        chunk: int,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(narrow), weight.to(narrow)
            sums = torch.empty(len(ids), dtype=wide(narrow), device=hidden.device)
            logp = torch.empty_like(sums)
            for rows, logits in _logits(h, w, bias, temperature, chunk):
                most = logits.amax(1, keepdim=True)
                at = logits.sub_(most).gather(1, ids[rows, None])
                total = logits.exp_().sum(1, keepdim=True).log_()
                logp[rows] = (at - total)[:, 0]  # to the bit what _KeptSlopes gives
                sums[rows] = (total + most)[:, 0]
        ctx.save_for_backward(h, weight, bias, ids, sums)
        ctx.given = (temperature, narrow, chunk, hidden.dtype)
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, ids, sums = ctx.saved_tensors
        temperature, narrow, chunk, dtype = ctx.given
        with torch.autocast(h.device.type, enabled=False):
            w = weight.to(narrow)
            pull = (grad / temperature).to(sums.dtype)
            dw = torch.zeros_like(weight, dtype=sums.dtype) if ctx.needs_input_grad[1] else None
            db = torch.zeros_like(bias, dtype=sums.dtype) if bias is not None and ctx.needs_input_grad[2] else None
            dh = torch.empty_like(h)
            slopes = torch.empty(min(chunk, len(ids)), len(w), dtype=narrow, device=h.device)
            for rows, logits in _logits(h, w, bias, temperature, chunk):
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
        return dh.to(dtype), None if dw is None else dw.to(weight.dtype), db, None, None, None, None


def _logits(
    h: Tensor, w: Tensor, bias: Tensor | None, temperature: float, chunk: int, into: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits [R, V] over the temperature) in float32 or wider. The buffer is the next piece's too.

    into [M, V]: where the products themselves are left; without it they share a chunk's memory.
    """
    size = min(chunk, len(h))
    raw = torch.empty(size, len(w), dtype=h.dtype, device=h.device) if into is None else into
    room = torch.empty(min(_ROWS, size), len(w), dtype=wide(h.dtype), device=h.device)
    for start in range(0, len(h), chunk):
        stop = min(start + chunk, len(h))
        part = raw[: stop - start] if into is None else raw[start:stop]
        torch.mm(h[start:stop], w.t(), out=part)
        for first in range(start, stop, _ROWS):
            last = min(first + _ROWS, stop)
            logits = room[: last - first].copy_(part[first - start : last - start])
            if bias is not None:
                logits += bias
            yield slice(first, last), logits if temperature == 1 else logits.div_(temperature)

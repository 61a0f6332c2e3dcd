"""Weights laid out for the processor's matrix kernels while completions are written.

Between two updates the weights do not change and are multiplied once a token: rounding them to bfloat16 once, and into
the blocks that oneDNN reads, saves the kernels from doing so at every token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lossmith.policy.load import Policy

__all__ = ["packed_weights"]

_ROWS = 64  # rows the blocks are chosen for; others are right, too


@contextlib.contextmanager
def packed_weights(policy: Policy) -> Iterator[None]:
    """Within, linear layers multiply by packed copies: on a CPU, in bfloat16, without gradient. Elsewhere as before."""
    # Those that are nothing but a product: a subclass, or a forward that somebody replaced, may do more.
    plain = (m for m in policy.model.modules() if type(m) is nn.Linear and "forward" not in m.__dict__)
    head = policy.model.get_output_embeddings() if policy.float32_head else None
    layers = [m for m in plain if m is not head] if _can_pack(policy) else []
    try:
        for layer in layers:
            layer.__dict__["forward"] = _packed_forward(layer)  # hides the class's own
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)  # the class's own is back


def _can_pack(policy: Policy) -> bool:
    known = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    bfloat16 = policy.compute_dtype == torch.bfloat16
    return policy.device.type == "cpu" and bfloat16 and known and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.no_grad()
def _packed_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.to(torch.bfloat16), _ROWS)
    bias = None if layer.bias is None else layer.bias.to(torch.bfloat16)

    def forward(x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), weight, bias, "none", [], "")
        return product

    return forward

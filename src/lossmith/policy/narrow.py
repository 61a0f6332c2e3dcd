"""Weights held in bfloat16: half the memory, where an optimizer carries along what the narrower type rounds away."""

from __future__ import annotations

from torch import bfloat16, nn

from lossmith.errors import PolicyError
from lossmith.policy.load import Policy

__all__ = ["hold_in_bfloat16"]


def hold_in_bfloat16(policy: Policy) -> None:
    """From now on its matrices are in bfloat16. Vectors, norms above all, stay as they are, and so does a float32 head.

    Norms have numbers near 1, which a small step would not change even with what is carried along, and next to no
    memory. PolicyError: it computes in a wider type, which products of these weights are not made in.
    """
    if policy.compute_dtype != bfloat16:
        raise PolicyError("weights in bfloat16 are multiplied in bfloat16: give dtype = 'bfloat16'.")
    head = policy.model.get_output_embeddings().weight if policy.float32_head else None
    held: dict[int, nn.Parameter] = {}  # one that has two names, a head that is the embedding too, stays one
    for module in policy.model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.dim() > 1 and p is not head:
                if id(p) not in held:
                    held[id(p)] = nn.Parameter(p.detach().to(bfloat16), requires_grad=p.requires_grad)
                module._parameters[name] = held[id(p)]

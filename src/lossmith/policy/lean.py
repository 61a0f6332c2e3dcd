"""Layers that store less for their backward pass: what a few cheap operations make again is made again there.

Two places of a usual layer. A gated feed-forward part, down(act(gate) * up), stores gate, act(gate), up and their
product, all of one size: the first and the third make the others. An RMSNorm stores its input and that normalized: the
input and a number a row make it. The forward pass is the module's own to the bit, and where it is not (which is tried
once for each kind of module) the module is left as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.policy.activation_checkpointing import model_layers
from lossmith.policy.load import Policy

__all__ = ["lean_layers", "storing_less"]

_ROWS = 3  # of the trial
_CLOSE = 1e-4  # greatest difference of a gradient in the trial, as a share of its largest number


@contextlib.contextmanager
def storing_less(policy: Policy) -> Iterator[None]:
    """Forward passes within, with gradient, store less; their backward pass may come after it.

    Nothing is done to compiled layers: what these store is the compiler's choice.
    """
    graded = torch.is_grad_enabled()  # else there is nothing to look for
    compiled = graded and any(layer._compiled_call_impl is not None for layer in model_layers(policy.model))
    layers = lean_layers(policy) if graded and not compiled else []
    for module, forward in layers:
        module.__dict__["forward"] = forward  # hides the class's own
    try:
        yield
    finally:
        for module, _ in layers:
            module.__dict__.pop("forward", None)


def lean_layers(policy: Policy) -> list[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """(module, its forward pass that stores less), found once."""
    if policy.lean is None:
        known: dict[type, bool] = {}
        policy.lean = []
        for module in policy.model.modules():
            forward = _lean_forward(module)
            if forward is None:
                continue
            if type(module) not in known:
                known[type(module)] = _is_the_same(module, forward)
            if known[type(module)]:
                policy.lean.append((module, forward))
    return policy.lean


def _lean_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Of a module that looks like one of the two kinds."""
    if "forward" in module.__dict__:  # somebody replaced it, who may do more
        return None
    children = dict(module.named_children())
    if children.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"} and not list(children["act_fn"].parameters()):
        return partial(_gated, module)
    own = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" in type(module).__name__ and own.keys() == {"weight"} and type(eps) is float:
        return partial(_normalized, module, eps)
    return None


def _is_the_same(module: Any, forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether it gives what the module gives, to the bit, and the same gradients up to rounding."""
    weight = next(module.parameters())
    if weight.is_meta:  # a model without weights, of which a plan is made
        return True
    width = module.gate_proj.in_features if hasattr(module, "gate_proj") else weight.shape[-1]
    kind = weight.dtype if weight.is_floating_point() else torch.float32  # quantized weights are none
    with torch.autocast(weight.device.type, enabled=False), torch.enable_grad():
        x = torch.linspace(-2, 3, _ROWS * width, device=weight.device).view(1, _ROWS, -1).cos().to(kind)
        found = []
        for each in (type(module).forward.__get__(module), forward):
            given = x.clone().requires_grad_()
            try:
                out = each(given)
                leaves = [given, *(p for p in module.parameters() if p.requires_grad)]
                found.append((out.detach(), torch.autograd.grad((out * out.detach().sin()).sum(), leaves)))
            except (TypeError, ValueError, RuntimeError, AttributeError):
                return False  # it is called in another way, or made for another machine
    (own, own_grads), (lean, lean_grads) = found
    return torch.equal(own, lean) and all(
        bool((a - b).abs().max() <= _CLOSE * a.abs().max()) for a, b in zip(own_grads, lean_grads, strict=True)
    )


# -- gated feed-forward ------------------------------------------------------------------------------------------------


_Made = list[tuple[Tensor, Tensor]]  # a gate as a leaf and its activation, from one use in a backward pass to the other


def _gated(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if not torch.is_grad_enabled():
        out: Tensor = module.down_proj(module.act_fn(gate) * up)
        return out
    made: _Made = []
    product: Tensor = _Product.apply(gate, up, module.act_fn, made)
    held, place = (gate.detach(), up.detach()), product.data_ptr()

    def pack(x: Tensor) -> Tensor | torch.Size:
        """What the last product would store of its input is made again from what is stored anyway."""
        same = x.data_ptr() == place and x.numel() == held[1].numel() and x.dtype == held[1].dtype and x.is_contiguous()
        return x.shape if same else x

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if not isinstance(packed, torch.Size):
            return packed
        made[:] = [_activation(held[0], module.act_fn)]
        return (made[0][1].detach() * held[1]).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        down: Tensor = module.down_proj(product)
        return down


def _activation(gate: Tensor, act: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        return leaf, act(leaf)


class _Product(torch.autograd.Function):
    """act(gate) * up, of which the two factors alone are stored: by autograd, which lets go of them layer by layer."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor], made: _Made) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.made = act, made
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        leaf, activation = ctx.made.pop() if ctx.made else _activation(gate, ctx.act)
        (gate_grad,) = torch.autograd.grad(activation, leaf, grad * up)
        return gate_grad, activation.detach() * grad, None, None


# -- RMSNorm -----------------------------------------------------------------------------------------------------------


def _normalized(module: Any, eps: float, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or x.dtype != module.weight.dtype:
        own: Tensor = type(module).forward(module, x)
        return own
    out: Tensor = _RmsNorm.apply(x, module.weight, eps)
    return out


class _RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        both = (grad * x).reshape(-1, x.shape[-1])
        weight_grad = both.t().mv(inverse.reshape(-1)) if ctx.needs_input_grad[1] else None
        along = both.mv(weight).view(inverse.shape)  # sum of the gradient of the normalized input times x
        x_grad = (grad * weight).mul_(inverse)
        x_grad.addcmul_(x, along.mul_(inverse.pow(3)), value=-1 / x.shape[-1])
        return x_grad, weight_grad, None

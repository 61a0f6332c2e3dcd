"""What people give as a field of a batch: a tensor, an array or nested lists -> a tensor that arithmetic can use."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from lossmith.errors import LossError
from lossmith.losses.piece import shown

__all__ = ["as_bool", "as_numbers", "as_whole_numbers", "wide"]


def as_bool(name: str, given: Any) -> Tensor:
    """True and false, or 1 and 0: a tensor of bool or of whole numbers, or lists."""
    found = _usable(name, given) if isinstance(given, Tensor) else _read(name, given)
    if found.dtype == torch.bool:
        return found
    if isinstance(given, Tensor) and given.is_floating_point():
        raise LossError(f"Batch.{name} must be bool, not {given.dtype}. Call .bool() on it first.")
    for at in ((found != 0) & (found != 1)).nonzero().tolist():
        where = ", ".join(f"{axis} {i}" for axis, i in zip(("row", "token"), at, strict=False))
        raise LossError(
            f"Batch.{name} must hold true and false, or 1 and 0, but is {float(found[tuple(at)]):g} at {where}."
        )
    return found.bool()


def as_whole_numbers(name: str, given: Any) -> Tensor:
    """Integers as int64."""
    found = _usable(name, given) if isinstance(given, Tensor) else _read(name, given)
    if found.is_floating_point() or found.dtype == torch.bool:
        what = found.dtype if isinstance(given, Tensor) else shown(given)
        raise LossError(f"Batch.{name} must hold whole numbers, not {what}.")
    return found.long()


def as_numbers(name: str, given: Any, *, score: bool = False) -> Tensor:
    """Floating numbers as they are, lists as float64. score: whole numbers and bool too, exactly."""
    found = _usable(name, given) if isinstance(given, Tensor) else _read(name, given)
    if found.is_floating_point() or (isinstance(given, Tensor) and not score):
        return found
    exact = found.double()
    if found.dtype != torch.bool and not torch.equal(exact.long(), found.long()):
        raise LossError(f"Batch.{name} holds whole numbers beyond 2^53, which float64 cannot tell apart. Shift them.")
    return exact


def wide(x: Tensor) -> Tensor:
    """In float64 where the device has it: rewards of 1e20 have squares that float32 does not hold."""
    return x if x.device.type == "mps" else x.double()


def _read(name: str, given: Any) -> Tensor:
    """Nested lists or an array of numbers: bool, int64 or float64."""
    try:
        if holds_tensors(given):
            raise TypeError
        found = torch.tensor(given)
        if found.is_complex():
            raise TypeError
        return torch.tensor(given, dtype=torch.float64) if found.is_floating_point() else found
    except (TypeError, ValueError, RuntimeError, OverflowError):  # whatever torch says of what it cannot read
        raise LossError(
            f"Batch.{name} must be a tensor, or nested lists of numbers whose rows are equally long, "
            f"not {shown(given)}."
        ) from None


def holds_tensors(given: Any) -> bool:
    """Whether a list has tensors in it: read as numbers, they would lose their gradient."""
    if not isinstance(given, Collection) or isinstance(given, (str, bytes)):
        return False
    return any(isinstance(x, Tensor) or (isinstance(x, (list, tuple)) and holds_tensors(x)) for x in given)


def _usable(name: str, given: Tensor) -> Tensor:
    """LossError: a tensor that holds no numbers, or not one at each place."""
    if given.is_nested:
        kind = "nested"
    elif given.layout != torch.strided:
        kind = "sparse"
    elif given.device.type == "meta":
        kind = "on the meta device, without numbers"
    elif given.is_complex():
        kind = "complex"
    elif given.is_quantized:
        kind = "quantised"
    else:
        return given
    raise LossError(f"Batch.{name} is {kind}; a batch holds dense tensors of real numbers.")

"""Small tensors on their way to the model's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["sent"]


def sent(values: Tensor | Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """These numbers on the device. On a GPU nothing is waited for: a plain copy would come after all work before it.

    The driver has read ordinary memory when the call returns, so that it may change at once.
    """
    x = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return x.to(device, non_blocking=device.type == "cuda")

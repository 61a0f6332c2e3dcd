"""Where a test may compute: here, on a GPU that is none, and on a real one (`-m gpu`)."""

import contextlib
import warnings

import pytest
import torch

from pretended import moved, pretended

REAL = pytest.param("cuda", marks=pytest.mark.gpu)
NO_GPU = "torch has no GPU here (torch.cuda.is_available() is False)"


@contextlib.contextmanager
def entered(kind):
    """The device of this name: "cpu", "pretended" or "cuda"."""
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    with pretended() if kind == "pretended" else contextlib.nullcontext():
        yield torch.device("cpu" if kind == "cpu" else "cuda:0")


def placed(policy, device):
    """The policy there; what is shared stays shared."""
    if device.type == "cuda":
        moved(policy.model)
        if policy.value_head is not None:
            moved(policy.value_head)
    return policy


@contextlib.contextmanager
def waits(kind):
    """A list that holds, once this is left, every time that the processor waited for the device."""
    found = []
    if kind == "pretended":
        mode = torch.utils._python_dispatch._get_current_dispatch_mode()
        before = len(mode.waits)
        yield found
        found += mode.waits[before:]
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{w.filename}:{w.lineno}" for w in seen if "synchronizing CUDA operation" in str(w.message)]

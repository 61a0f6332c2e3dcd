"""`lossmith merge`: an adapter and its base model as one plain folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from lossmith.policy.merging import merge_adapter

__all__ = ["merge"]


def merge(folder: Path, /, *, output: Annotated[Path, Parameter(name=["--output", "-o"])]) -> None:
    """Write a LoRA adapter and its base model as one plain model folder, in float32.

    Parameters
    ----------
    folder
        The adapter's folder, or that of a run, whose policy/ is meant.
    output
        A new folder for the model.
    """
    written = merge_adapter(folder, output)
    Console().print(f"written to {written}", highlight=False, soft_wrap=True, markup=False)

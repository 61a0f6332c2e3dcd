"""`lossmith plot`: reward against distance, of one run or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from lossmith.errors import RunError
from lossmith.files import at_home, check_writable
from lossmith.report.run.frontier import plot_frontier

__all__ = ["plot"]


def plot(
    *runs: Path,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("frontier.svg"),
    smooth: int = 3,
) -> None:
    """Plot trained and watched score against the distance that the policy has moved, sqrt(KL).

    Parameters
    ----------
    runs
        Run folders; each becomes a line.
    output
        Image to write: .svg, .png or .pdf.
    smooth
        Steps in the mean that makes one point.
    """
    if not runs:
        raise RunError("give one run folder or more: lossmith plot runs/NAME -o frontier.svg")
    if output.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise RunError(f"{output}: the image is an .svg, .png or .pdf file.")
    if smooth < 1:
        raise RunError(f"smooth = {smooth}, but a point is the mean of at least one step.")
    plot_frontier([at_home(run) for run in runs], check_writable(output), smooth)
    Console().print(f"{len(runs)} run{'s' * (len(runs) > 1)} plotted to {output}", highlight=False)

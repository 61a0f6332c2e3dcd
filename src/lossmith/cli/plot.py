"""`lossmith plot`: reward against distance, of one run or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lossmith.report.run.frontier import plot_frontier
from lossmith.terminal import Terminal

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
    plot_frontier(runs, output, smooth)
    Terminal().print(f"{len(runs)} run{'s' * (len(runs) > 1)} plotted to {output}", highlight=False)

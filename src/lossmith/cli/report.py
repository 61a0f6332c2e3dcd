"""`lossmith report`: one page about a run, or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lossmith.report.page import write_report
from lossmith.terminal import Terminal

__all__ = ["report"]


def report(
    *runs: Path,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("report.html"),
) -> None:
    """One page about a run or several, for somebody who was not there: a file that opens without a network.

    What was trained with what, before and after, curves, what the detectors found, completions, time, and the recipe.
    Of several runs also what differs; those of one recipe with other seeds are drawn as their mean and range.

    Parameters
    ----------
    runs
        Run folders: finished, dead or under way, of `lossmith train` or `lossmith prefer`.
    output
        HTML file to write.
    """
    place = write_report(runs, output)
    told = f"wrote {place} ({place.stat().st_size / 1e6:.1f} MB, about {len(runs)} run{'s' * (len(runs) > 1)})"
    Terminal().print(told, markup=False, highlight=False, soft_wrap=True)

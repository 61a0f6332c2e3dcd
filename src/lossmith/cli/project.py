"""`lossmith init` and `lossmith status`: a project, and where it stands."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from lossmith.cli.streams import print_json
from lossmith.errors import StageError
from lossmith.project import MARK, Project, Stage
from lossmith.terminal import Terminal, put_table

__all__ = ["init", "status"]


def init(
    folder: Path,
    /,
    *,
    prompts: str = "default",
    prompt_column: str = "prompt",
    prompt_limit: int | None = None,
    pass_columns: Annotated[tuple[str, ...], Parameter(negative="")] = (),
) -> None:
    """Begin a project: the chain from prompts over people's judgements to a policy, in one folder.

    Parameters
    ----------
    folder
        The project's folder; made if it is not there.
    prompts
        'default', a file, a datasets folder, or a hub name. The project gets a copy.
    prompt_column
        Column that holds the prompt.
    prompt_limit
        Use only this many prompts.
    pass_columns
        Target-like columns that the scorer may see.
    """
    project = Project.create(folder, prompts, column=prompt_column, limit=prompt_limit, pass_columns=pass_columns)
    Terminal(stderr=True).print(project.prompts_summary, highlight=False, markup=False, soft_wrap=True)
    _show(project.folder, project.stages())


def status(
    folder: Path = Path(), /, *, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False
) -> None:
    """Show where a project stands, and the next command.

    Parameters
    ----------
    folder
        The project's folder, or any place in it.
    as_json
        Print it as JSON.
    """
    project = Project.around(folder)
    if project is None:
        raise StageError(f"{folder} is in no project: no {MARK} in it or above it. Begin one: lossmith init FOLDER")
    stages = project.stages()
    if as_json:
        print_json({"folder": str(project.folder), "stages": [dataclasses.asdict(s) for s in stages]})
    else:
        _show(project.folder, stages)


def _show(folder: Path, stages: list[Stage]) -> None:
    console = Terminal()
    table = Table(title=f"Project {folder}", title_justify="left", box=None, padding=(0, 2))
    for name in ("", "step", "found"):
        table.add_column(name)
    for stage in stages:
        problem = f"\n! {stage.problem}" if stage.problem else ""
        table.add_row(
            "!" if stage.advice else "✓" if stage.done else "·",
            stage.step,
            (stage.summary if stage.done else "-") + problem,
        )
    put_table(console, table)
    following = next((stage for stage in stages if not stage.done or stage.advice), None)
    if following is None:
        console.print("The chain is complete. Sample from the new policy and judge again, or see docs/feedback.md.")
    else:
        console.print(f"next: {following.advice or following.command}", highlight=False, soft_wrap=True, markup=False)

"""`lossmith doctor RUN`: what is wrong with a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lossmith.cli.streams import print_json
from lossmith.report.run.doctor import doctor

__all__ = ["doctor_"]


def doctor_(
    run: Path,
    /,
    *,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    fail_on: Literal["warn", "stop", "never"] = "never",
) -> None:
    """What is wrong with a run: no signal, collapse, over-optimization, a sampler that is not the learner, and more.

    Looks at metrics.jsonl and rollouts/ of a run that is finished, dead or under way, and runs none of its code.
    docs/doctor.md says what each detector looks for, and how often it is wrong.

    Parameters
    ----------
    run
        A run's folder, its metrics.jsonl, or rollouts as `lossmith replay` reads them, of other trainers too.
    as_json
        Print JSON. Steps are counted from 0 there, as in the names of the files.
    fail_on
        Exit with 1 where something of this level or worse is found.
    """
    found = doctor(run)
    if as_json:
        print_json(found.as_dict())
    else:
        print(found)
    if fail_on != "never" and found.at_least(fail_on):
        sys.exit(1)

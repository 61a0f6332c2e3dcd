"""A round in step against one round ahead, on a Ray cluster of this machine: one sampler, one learner, a core each.

    python benchmarks/cluster.py --rounds 2

Each round runs every way, one after the other. Seconds of a step are those that metrics.jsonl has by phase; the first
two steps of a run, which still load and measure, do not count. Adds to benchmarks/results/cluster.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import description

RESULTS = Path(__file__).parent / "results" / "cluster.json"
WAYS = {
    "in step": ["--max-staleness", "0"],
    "one round ahead": ["--max-staleness", "1"],
}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=2)
    asked.add_argument("--steps", type=int, default=5)
    asked.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    given = asked.parse_args()
    for _ in range(given.rounds):
        for way in given.only:
            write(way, seconds(WAYS[way], given.steps))


def write(way: str, found: dict[str, float]) -> None:
    """Beside what was measured before, where that was on the same machine."""
    rows: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = rows if rows.get("machine") == description() else {"machine": description(), "seconds": {}}
    rows["seconds"].setdefault(way, []).append(found)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{way}: {found}", flush=True)


def seconds(options: list[str], steps: int) -> dict[str, float]:
    """Of a step of the default model, by phase and in all: medians over the steps that count."""
    with tempfile.TemporaryDirectory() as runs:
        command = [
            sys.executable, "-m", "lossmith", "train", "--cluster", "ray", *options,
            "--steps", str(steps), "--prompts-per-step", "4", "--samples-per-prompt", "8", "--held-out", "2",
            "--checkpoint-minutes", "0", "--runs", runs, "--name", "run",
        ]  # fmt: skip
        subprocess.run(command, check=True, env=os.environ, stdout=subprocess.DEVNULL)
        lines = (Path(runs) / "run" / "metrics.jsonl").read_text().splitlines()[2:]
    steps_seen = [
        {k.removeprefix("seconds_"): v for k, v in json.loads(x).items() if k.startswith("seconds_")} for x in lines
    ]
    for one in steps_seen:
        one["step"] = sum(v for k, v in one.items() if not k.startswith("update_"))
    return {k: round(statistics.median(one[k] for one in steps_seen), 2) for k in steps_seen[0]}


if __name__ == "__main__":
    main()

"""A round in step against one round ahead, on a Ray cluster of this machine: one sampler, one learner, a core each.

    python benchmarks/cluster.py --pairs 3

Each pair runs both ways, one after the other. Seconds of a step are from one line of metrics.jsonl to the next; the
first two steps of a run, which still load and measure, do not count. Writes benchmarks/results/cluster.json.
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

from machine import description

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--pairs", type=int, default=3)
    asked.add_argument("--steps", type=int, default=6)
    given = asked.parse_args()
    pairs = [tuple(seconds(ahead, given.steps) for ahead in (0, 1)) for _ in range(given.pairs)]
    ratios = [in_step / ahead for in_step, ahead in pairs]
    found = {
        "machine": description(), "steps": given.steps, "pairs": pairs,
        "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
    }  # fmt: skip
    print(f"one round ahead: {found['ratio']:.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")
    (RESULTS / "cluster.json").write_text(json.dumps(found, indent=1) + "\n")


def seconds(ahead: int, steps: int) -> float:
    """Median seconds of a step of the default model."""
    with tempfile.TemporaryDirectory() as runs:
        command = [
            sys.executable, "-m", "lossmith", "train", "--cluster", "ray", "--max-staleness", str(ahead),
            "--steps", str(steps), "--prompts-per-step", "4", "--samples-per-prompt", "8", "--held-out", "2",
            "--checkpoint-minutes", "0", "--runs", runs, "--name", "run",
        ]  # fmt: skip
        subprocess.run(command, check=True, env=os.environ, stdout=subprocess.DEVNULL)
        lines = (Path(runs) / "run" / "metrics.jsonl").read_text().splitlines()
    parts = [
        sum(v for k, v in json.loads(line).items() if k.startswith("seconds_") and not k.startswith("seconds_update_"))
        for line in lines[2:]
    ]
    print(f"max_staleness = {ahead}: {statistics.median(parts):.1f} s a step", flush=True)
    return statistics.median(parts)


if __name__ == "__main__":
    main()

"""How far the sampler is from the learner in bfloat16, and what logits in float32 cost: steps of one recipe, in turn.

python benchmarks/sampler_gap.py [--rounds 3] [options of `lossmith train`]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import description

RESULTS = Path(__file__).parent / "results"
WAYS = {
    "bfloat16": ["--dtype", "bfloat16"],
    "bfloat16, float32_head": ["--dtype", "bfloat16", "--float32-head"],
    "float32": ["--dtype", "float32"],
}
SHOWN = ("sampler_gap", "sampler_outside", "seconds_sample", "seconds_update")


def step(options: list[str]) -> dict[str, Any]:
    """The second step of a run: the first one warms up."""
    with tempfile.TemporaryDirectory() as runs:
        small = ["--steps", "2", "--held-out", "2", "--runs", runs, "--name", "run"]
        subprocess.run([sys.executable, "-m", "lossmith", "train", *small, *options], check=True, capture_output=True)
        return json.loads((Path(runs) / "run" / "metrics.jsonl").read_text().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    given, more = parser.parse_known_args()
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(given.rounds):
        for way, options in WAYS.items():
            found[way].append({name: value for name, value in step([*options, *more]).items() if name in SHOWN})
            print(way, found[way][-1], flush=True)
    medians = {way: {k: statistics.median(s[k] for s in steps) for k in SHOWN} for way, steps in found.items()}
    (RESULTS / "sampler_gap.json").write_text(
        json.dumps({"machine": description(), "options": more, "medians": medians, "steps": found}, indent=1) + "\n"
    )
    print("| way | gap, nats a token | outside [0.9, 1.1] | sampling, s | update, s |\n|---|---|---|---|---|")
    for way, m in medians.items():
        print(f"| {way} | {m['sampler_gap']:.4f} | {m['sampler_outside']:.1%} | ", end="")
        print(f"{m['seconds_sample']:.1f} | {m['seconds_update']:.1f} |")


if __name__ == "__main__":
    main()

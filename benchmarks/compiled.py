"""A step with compile = true beside one without: same prompts, sizes, seeds, in turn, each in a process of its own.

    python benchmarks/compiled.py [--works short long] [--pairs 5] [--out FILE]

The first two steps of each are reported apart: compiling falls into the first, first use of memory into both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from machine import description
from versus_trl import HERE, Side, in_turn
from works import WORKS, described

from lossmith.policy import embedded_model, load_policy

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "compile": {"compile": True},
    "compile, 2048 tokens a pass": {"compile": True, "micro_batch_tokens": 2048},
}
WARM = 2


def measure(name: str, pairs: int, threads: int, logs: Path) -> dict[str, Any]:
    model = str(embedded_model())
    policy = load_policy(model)
    work = described(policy, WORKS[name], model, threads)
    del policy
    sides = {
        way: Side(sys.executable, "lossmith_worker.py", {**work, "lossmith": more}, logs / f"{name}-{i}.log")
        for i, (way, more) in enumerate(WAYS.items())
    }
    return {"work": name, "steps": in_turn(name, sides, pairs + WARM)}


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| work | way | first two steps s | step s | update s | default over it | peak |", "|---" * 7 + "|"]
    for result in results:
        plain = [x["seconds"]["total"] for x in result["steps"]["default"][WARM:]]
        for way, steps in result["steps"].items():
            first = " + ".join(f"{x['seconds']['total']:.1f}" for x in steps[:WARM])
            total = [x["seconds"]["total"] for x in steps[WARM:]]
            update = statistics.median(x["seconds"]["total"] - x["seconds"]["sample"] for x in steps[WARM:])
            ratio = statistics.median(a / b for a, b in zip(plain, total, strict=True))
            peak = max(x["peak_gb"] for x in steps)
            lines.append(
                f"| {result['work']} | {way} | {first} | {statistics.median(total):.1f} | {update:.1f} | {ratio:.2f} | "
                f"{peak:.1f} GB |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", default=["short", "long"], choices=list(WORKS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "compiled.json")
    given = parser.parse_args()
    logs = given.out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    results = [measure(name, given.pairs, given.threads, logs) for name in given.works]
    given.out.write_text(json.dumps({"machine": description(), "results": results}, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()

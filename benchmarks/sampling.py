"""Sampling beside transformers' `generate` and, where its environment is given, vLLM: the same prompts, in turn.

python benchmarks/sampling.py [--vllm PYTHON] [--work short] [--rounds 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from machine import description
from versus_trl import Side
from works import WORKS, described

from lossmith.policy import embedded_model, load_policy

HERE = Path(__file__).parent


def rate(step: dict[str, Any]) -> float:
    return step["tokens"] / step["seconds"]["sample"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="Python of an environment with vLLM")
    parser.add_argument("--work", default="short", choices=list(WORKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "sampling.json")
    given = parser.parse_args()
    model = str(embedded_model())
    work = described(load_policy(model), WORKS[given.work], model, given.threads)
    logs = given.out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    sides = {
        "lossmith": Side(sys.executable, "sampling_worker.py", work, logs / "sampling-lossmith.log"),
        "transformers": Side(sys.executable, "transformers_worker.py", work, logs / "sampling-transformers.log"),
    }
    if given.vllm:
        sides["vllm"] = Side(given.vllm, "vllm_worker.py", work, logs / "sampling-vllm.log")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    try:
        for _ in range(given.rounds + 1):
            for name, side in sides.items():
                step = side.step()
                if step is None:
                    raise SystemExit(f"{name} died; see {side.log}")
                found[name].append(step)
                print(name, json.dumps(step), flush=True)
    finally:
        for side in sides.values():
            side.end()
    given.out.write_text(json.dumps({"machine": description(), "work": given.work, "steps": found}, indent=1))
    print(table(found))


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| who | tokens/s | Lossmith against it | peak |", "|---|---|---|---|"]
    for name, steps in found.items():
        ratios = [rate(a) / rate(b) for a, b in zip(found["lossmith"][1:], steps[1:], strict=True)]
        lines.append(
            f"| {name} | {statistics.median(map(rate, steps[1:])):.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {max(x['peak_gb'] for x in steps):.1f} GB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

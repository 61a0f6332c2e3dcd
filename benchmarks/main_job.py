"""The main job's figures, and what makes two runs of one recipe differ.

    python benchmarks/main_job.py                       # README's figures: the default run, for each seed
    python benchmarks/main_job.py --repeat --steps 4    # the same run again, under other circumstances

A run is a process of its own. The first writes benchmarks/results/main_job.json; the second main_job_repeat.json, with
the first step whose record is not the same to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import description

RESULTS = Path(__file__).parent / "results"
# Of the same recipe and seed. `load`: two processes that do nothing but compute stand beside it.
CIRCUMSTANCES: dict[str, dict[str, Any]] = {
    "again": {},
    "under load": {"load": True},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "layers run again": {"options": ["--memory-gb", "0.1"]},
    "half the micro-batch": {"options": ["--micro-batch-tokens", "512"]},
    "the other compute type": {"options": ["--dtype", "OTHER"]},
}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked.add_argument("--repeat", action="store_true")
    asked.add_argument("--only", nargs="+", choices=list(CIRCUMSTANCES), default=list(CIRCUMSTANCES))
    given, options = asked.parse_known_args()
    if given.repeat:
        write("main_job_repeat.json", repeats(given.only, options))
    else:
        write("main_job.json", {"runs": [figures(seed, options) for seed in given.seeds]})


def write(name: str, found: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps({"machine": description(), **found}, indent=1) + "\n")


def figures(seed: int, options: list[str]) -> dict[str, Any]:
    """One run, as README quotes it."""
    with tempfile.TemporaryDirectory() as runs:
        found = run(runs, ["--seed", str(seed), *options])
    held_out = found["summary"]["held_out"]
    before, after, difference = (held_out[key] for key in ("before", "after", "difference"))
    print(
        f"seed {seed}: {before['mean']:.3f} ({before['ended']:.0%} ended) to {after['mean']:.3f} "
        f"({after['ended']:.0%}), {difference['mean']:+.3f} ({difference['ci95_low']:+.3f} to "
        f"{difference['ci95_high']:+.3f}); {found['seconds']:.0f} s, {found['peak_gb']:.1f} GB; "
        + ", ".join(f"{f['level']} {f['detector']}" for f in found["findings"]),
        flush=True,
    )
    return {"seed": seed, "seconds": found["seconds"], "peak_gb": found["peak_gb"], "held_out": held_out} | {
        "around": found["inputs"].get("around"),
        "last_step": found["records"][-1],
        "findings": found["findings"],
    }


def repeats(names: list[str], options: list[str]) -> dict[str, Any]:
    """The run once, then under each circumstance."""
    with tempfile.TemporaryDirectory() as runs:
        first = run(runs, options)
        other = "float32" if "bfloat16" in json.dumps(first["inputs"]) else "bfloat16"
        found = {}
        for name in names:
            how = CIRCUMSTANCES[name]
            more = [other if x == "OTHER" else x for x in how.get("options", [])]
            with busy(2 if how.get("load") else 0):
                again = run(runs, [*options, *more], {k: v for k, v in how.items() if k.isupper()})
            found[name] = first_difference(first["records"], again["records"])
            print(f"{name}: {found[name]}", flush=True)
    return {"options": options, "first difference": found, "inputs": first["inputs"]}


def run(runs: str, options: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """`lossmith train`, in a folder of its own: summary, records, inputs, seconds and peak memory of the process."""
    name = f"run-{len(list(Path(runs).iterdir()))}"
    command = [sys.executable, "-m", "lossmith", "train", "--runs", runs, "--name", name, *options]
    started = time.perf_counter()
    with (Path(runs) / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | (environment or {}))
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{(Path(runs) / f'{name}.log').read_text()[-2000:]}")
    folder = Path(runs) / name
    inputs, findings = folder / "inputs.json", folder / "findings.jsonl"
    return {
        "seconds": time.perf_counter() - started,
        "peak_gb": used.ru_maxrss * 1024 / 1e9,
        "summary": json.loads((folder / "summary.json").read_text()),
        "records": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "inputs": json.loads(inputs.read_text()) if inputs.exists() else {},
        "findings": [json.loads(line) for line in findings.read_text().splitlines()] if findings.exists() else [],
    }


def first_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """Where two runs part, seconds and rates aside."""
    for number, (a, b) in enumerate(zip(one, other, strict=True), 1):
        parted = [k for k in a if not k.startswith("seconds") and k != "tokens_per_second" and a[k] != b.get(k)]
        if parted:
            return f"step {number}: {parted[0]} {a[parted[0]]!r} and {b.get(parted[0])!r}"
    return f"none in {len(one)} steps"


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that only compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()

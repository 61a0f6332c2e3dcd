"""A GRPO step of Lossmith beside one of TRL: same model, prompts, sizes, optimizer and scorer, step by step in turn.

    python benchmarks/versus_trl.py --trl PYTHON [--works short long ...] [--pairs 3] [--trl-batch 16] [--out FILE]

PYTHON is the interpreter of an environment with TRL (`pip install trl`); it needs no Lossmith. Each side runs in a
process of its own; the first step of each warms up and is reported apart. Ratios are medians over pairs of steps that
ran one after the other. Both compute in bfloat16 where the machine has it, and else in float32, where TRL's batch must
be smaller to fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import description
from works import WORKS, described

from lossmith.policy import embedded_model, load_policy

HERE = Path(__file__).parent


class Side:
    """A worker in its own process, one step at a time."""

    def __init__(self, python: str, script: str, work: dict[str, Any], log: Path) -> None:
        command = [python, str(HERE / script), json.dumps(work)]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.log = log

    def step(self) -> dict[str, Any] | None:
        """What the worker measured, or None where it died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print("go", file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return None
        line = self.process.stdout.readline()
        return json.loads(line) if line.strip() else None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def in_turn(name: str, sides: dict[str, Side], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What each side measured in so many rounds, one step of each a round; all are ended afterwards."""
    steps: dict[str, list[dict[str, Any]]] = {who: [] for who in sides}
    try:
        for _ in range(rounds):
            for who, side in sides.items():
                found = side.step()
                if found is None:
                    raise SystemExit(f"{name}: {who} died; see {side.log}")
                steps[who].append(found)
                print(name, who, json.dumps(found), flush=True)
    finally:
        for side in sides.values():
            side.end()
    return steps


def measure(name: str, trl_python: str, given: argparse.Namespace, logs: Path) -> dict[str, Any]:
    model = str(embedded_model())
    policy = load_policy(model)
    asked = WORKS[name] if given.trl_batch is None else dataclasses.replace(WORKS[name], trl_batch=given.trl_batch)
    work = described(policy, asked, model, given.threads)
    lengths = [len(policy.tokenizer(t)["input_ids"]) for t in work["prompts"]]
    del policy
    sides = {
        "trl": Side(trl_python, "trl_worker.py", work, logs / f"{name}-trl.log"),
        "lossmith": Side(sys.executable, "lossmith_worker.py", work, logs / f"{name}-lossmith.log"),
    }
    steps = in_turn(name, sides, given.pairs + 1)
    how = {"trl_batch": asked.trl_batch, "dtype": work["dtype"]}
    return {"work": name, **how, "prompt_tokens": lengths, "steps": steps}


def ratios(result: dict[str, Any], part: str) -> list[float]:
    """TRL's seconds over ours in each warm pair."""
    ours, theirs = (result["steps"][side][1:] for side in ("lossmith", "trl"))
    return [b["seconds"][part] / a["seconds"][part] for a, b in zip(ours, theirs, strict=True)]


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| work | TRL s | Lossmith s | ratio (range) | sampling | peak TRL | peak Lossmith | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        ours, theirs = (result["steps"][side][1:] for side in ("lossmith", "trl"))
        seconds = [statistics.median(x["seconds"]["total"] for x in side) for side in (theirs, ours)]
        peaks = [max(x["peak_gb"] for x in side) for side in (theirs, ours)]
        step, sampling = ratios(result, "total"), ratios(result, "sample")
        lines.append(
            f"| {result['work']} | {seconds[0]:.1f} | {seconds[1]:.1f} | **{statistics.median(step):.2f}** "
            f"({min(step):.2f} to {max(step):.2f}) | {statistics.median(sampling):.2f} | {peaks[0]:.1f} GB | "
            f"{peaks[1]:.1f} GB | {peaks[0] / peaks[1]:.2f} |"
        )
    return "\n".join(lines)


def phases(results: list[dict[str, Any]]) -> str:
    """Where a step's seconds go, medians; `rest` is all that no phase counts."""
    names = ["sample", "log_probs", "forward", "loss_forward", "loss", "backward", "optimizer", "rest"]
    lines = ["| work | who | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for result in results:
        for side in ("trl", "lossmith"):
            steps = [dict(x["seconds"]) for x in result["steps"][side][1:]]
            for x in steps:
                x["rest"] = x["total"] - sum(v for k, v in x.items() if k != "total")
            cells = [f"{statistics.median(x.get(n, 0.0) for x in steps):.2f}" if n in steps[0] else "" for n in names]
            lines.append(f"| {result['work']} | {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path, machine: str) -> None:
    """Seconds of a step by phase, TRL beside Lossmith, for each work."""
    from matplotlib import pyplot

    parts = {"sample": "sampling", "log_probs": "old and reference", "forward": "forward", "backward": "backward"}
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.8 * len(results)), layout="constrained")
    for row, result in enumerate(results):
        for offset, side in ((-0.2, "trl"), (0.2, "lossmith")):
            steps = [x["seconds"] for x in result["steps"][side][1:]]
            left = 0.0
            for color, (part, label) in enumerate(parts.items()):
                names = (part, "loss_forward") if part == "forward" else (part,)
                width = statistics.median(sum(x.get(n, 0.0) for n in names) for x in steps)
                shown = label if row == 0 and side == "trl" else None
                axes.barh(row + offset, width, 0.36, left=left, color=f"C{color}", label=shown)
                left += width
            axes.text(left, row + offset, f" {side} {left:.0f} s", va="center", fontsize=8)
    axes.set_yticks(range(len(results)), [result["work"] for result in results])
    axes.set(xlabel="seconds a step (medians)", title=machine)
    axes.title.set_fontsize(7)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="Python of an environment with TRL; without it, what FILE holds is shown again")
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl-batch", type=int, help="completions in TRL's forward pass; by default the work's own")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "versus_trl.json")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    logs = given.out.parent / "logs"
    logs.mkdir(exist_ok=True)
    results: list[dict[str, Any]] = []
    for name in given.works if given.trl else ():
        results.append(measure(name, given.trl, given, logs))
        given.out.write_text(json.dumps({"machine": description(), "results": results}, indent=1))
    record = json.loads(given.out.read_text())
    plot(record["results"], given.out.with_suffix(".svg"), record["machine"])
    print(table(record["results"]), phases(record["results"]), sep="\n\n")


if __name__ == "__main__":
    main()

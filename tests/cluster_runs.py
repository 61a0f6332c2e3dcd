"""A run on a Ray cluster of this machine, whose processes are killed at random moments.

    python tests/cluster_runs.py FOLDER --kills 10      # the issue of it: each kind of process that many times

Prints, for each kind, the kills and whether metrics and rollouts are those of the run that nobody disturbed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet
import tomli_w

import tiny

KINDS = ("SamplerProcess", "ScorerProcess", "LearnerProcess")
SCORER = """
import time
def score(prompts, completions, **_):
    time.sleep({pause})
    return [len(set(c)) / 10 for c in completions]
"""


def recipe(folder: Path, pause: float = 0.0, **settings) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(f"Say something about {k}." for k in range(40)))
    (folder / "score.py").write_text(SCORER.format(pause=pause))
    settings = {
        "model": str(tiny.folder("llama")), "prompts": "prompts.txt", "scorer": "score.py:score", "runs": "runs",
        "prompts_per_step": 4, "samples_per_prompt": 4, "max_tokens": 12, "held_out": 4, "learning_rate": 1e-3,
        "steps": 4, "memory_gb": 4.0, "guards": {"all": "off"}, **settings,
    }  # fmt: skip
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(settings))
    return path


def train(path: Path, name: str, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lossmith", "train", str(path), "--name", name, *options]
    with (path.parent / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def processes(run: subprocess.Popen, kind: str) -> list[psutil.Process]:
    """The run's processes of a kind, idle or at work."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(f"ray::{kind}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill(run: subprocess.Popen, folder: Path, kind: str, times: int, seed: int) -> list[int]:
    """kill -9, `times`, each after at least one more step; returns after how many steps each was."""
    moments, done = random.Random(seed), []
    for _ in range(times):
        at = steps_done(folder)
        while run.poll() is None and steps_done(folder) <= at:  # a learner that goes on may first go back
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 1.0))
        victims = processes(run, kind)
        if run.poll() is not None or not victims:
            break
        moments.choice(victims).send_signal(signal.SIGKILL)
        done.append(steps_done(folder))
    return done


def learned(folder: Path) -> list[dict]:
    """metrics.jsonl without what took how long, and what was sent."""
    others = ("seconds_", "push_", "tokens_per_second")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(others)} for line in lines]


def rollouts(folder: Path) -> list[tuple]:
    """Of all steps: (step, prompt, sample, token ids), as they were learned from."""
    found = []
    for path in sorted((folder / "rollouts").glob("step-*.parquet")):
        columns = pyarrow.parquet.read_table(path, columns=["prompt_id", "sample", "tokens"]).to_pydict()
        found += [
            (path.stem, *row)
            for row in zip(columns["prompt_id"], columns["sample"], map(tuple, columns["tokens"]), strict=True)
        ]
    return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("folder", type=Path)
    asked.add_argument("--kills", type=int, default=10)
    asked.add_argument("--kinds", nargs="+", default=KINDS)
    given = asked.parse_args()
    path = recipe(given.folder, pause=0.3, steps=3 * given.kills, checkpoint_every=2)
    options = ("--cluster", "ray", "--samplers", "2")
    undisturbed = train(path, "undisturbed", *options)
    assert undisturbed.wait() == 0, (given.folder / "undisturbed.log").read_text()
    runs = given.folder / "runs"
    for kind in given.kinds:
        run = train(path, kind, *options)
        after = kill(run, runs / kind, kind, given.kills, seed=len(kind))
        code = run.wait()
        ours, theirs = rollouts(runs / kind), rollouts(runs / "undisturbed")
        print(
            f"{kind}: exit {code}, {len(after)} kills after steps {after}; rollouts {len(ours)} of {len(theirs)}, "
            f"used twice {len(ours) - len({r[:3] for r in ours})}, the same {ours == theirs}; "
            f"metrics the same {learned(runs / kind) == learned(runs / 'undisturbed')}",
            flush=True,
        )


if __name__ == "__main__":
    main()

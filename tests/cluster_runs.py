"""A run on a Ray cluster of this machine, whose processes are killed at random moments.

    python tests/cluster_runs.py FOLDER --kills 10      # the issue of it: each kind of process that many times
    python tests/cluster_runs.py FOLDER --kills 3 --sampler vllm      # with servers: LOSSMITH_VLLM names vLLM's Python

Prints, for each kind, the kills and whether metrics and rollouts are those of the run that nobody disturbed.
"""

import argparse
import contextlib
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
SERVED = {"sampler": "vllm", "model": str(tiny.folder("served")), "dtype": "float32", "device": "cpu"}
MARK = "LOSSMITH_TEST_RUN"  # a variable of the environment of all processes that a run starts
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(path.parent / name)}
    with (path.parent / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def processes(path: Path, name: str, kind: str = "") -> list[psutil.Process]:
    """All that was started for a run and is there still; of a kind alone, idle or at work."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mine = process.environ().get(MARK) == str(path.parent / name)
            if mine and process.cmdline()[0].startswith((f"ray::{kind}", f"VLLM::{kind}") if kind else ""):
                found.append(process)
    return found


def left(path: Path, name: str, seconds: float = 30.0) -> list[str]:
    """What of a run that has ended is there so long after."""
    end = time.monotonic() + seconds
    while (there := processes(path, name)) and time.monotonic() < end:
        time.sleep(0.5)
    return [str(process) for process in there]


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill(run: subprocess.Popen, path: Path, name: str, kind: str, times: int, seed: int) -> list[int]:
    """kill -9, `times`, each after at least one more step; returns after how many steps each was."""
    moments, done, folder = random.Random(seed), [], path.parent / "runs" / name
    for _ in range(times):
        at = steps_done(folder)
        while run.poll() is None and steps_done(folder) <= at:  # a learner that goes on may first go back
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 1.0))
        victims = processes(path, name, kind)
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
    asked.add_argument("--sampler", choices=("torch", "vllm"), default="torch")
    asked.add_argument("--kinds", nargs="+")
    given = asked.parse_args()
    serves = given.sampler == "vllm"
    path = recipe(given.folder, pause=0.3, steps=3 * given.kills, checkpoint_every=2, **(SERVED if serves else {}))
    options = ("--cluster", "ray", "--samplers", "2")
    undisturbed = train(path, "undisturbed", *options)
    assert undisturbed.wait() == 0, (given.folder / "undisturbed.log").read_text()
    runs = given.folder / "runs"
    for kind in given.kinds or (*KINDS, *(["EngineCore"] if serves else [])):
        run = train(path, kind, *options)
        after = kill(run, path, kind, kind, given.kills, seed=len(kind))
        code = run.wait()
        ours, theirs = rollouts(runs / kind), rollouts(runs / "undisturbed")
        print(
            f"{kind}: exit {code}, {len(after)} kills after steps {after}; rollouts {len(ours)} of {len(theirs)}, "
            f"used twice {len(ours) - len({r[:3] for r in ours})}, the same {ours == theirs}; "
            f"metrics the same {learned(runs / kind) == learned(runs / 'undisturbed')}; left behind {left(path, kind)}",
            flush=True,
        )


if __name__ == "__main__":
    main()

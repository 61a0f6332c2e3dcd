"""A run hit at one system call, gone on with, and compared bit by bit with the run that nothing ever hit.

python tests/kill_points.py [--count 200] [--seed 0] [--kinds kill term int full] prints how each kind ended.

Every run is a fork of this process, which itself never trains: autograd does not survive a fork. A hit is the k-th
call that opens a file for writing, flushes, renames, deletes or makes a folder; a kill also tears what was being
written, as a power cut would.
"""

import argparse
import builtins
import collections
import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet
import safetensors.torch
import torch
from rich.console import Console

import lossmith.durable.checkpoint
import tiny
from lossmith.api import resume, run_recipe
from lossmith.errors import FinishedError, LossmithError
from lossmith.training import Recipe, open_run, plan
from lossmith.training.clock import Clock
from lossmith.training.loop import sample_and_score

KINDS = ("kill", "term", "int", "full")
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
PACES = {"step": {"checkpoint_every": 1, "checkpoint_minutes": 0}, "time": {"checkpoint_minutes": 1e-5}}
QUIET = Console(quiet=True)


def settings(runs, pace):
    return dict(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=[f"Prompt {i}?" for i in range(6)], held_out=2,
        scorer="length", loss="grpo(beta=0.1, kl_control='adaptive')", steps=3, prompts_per_step=2,
        samples_per_prompt=2, max_tokens=5, learning_rate=3e-3, runs=str(runs), name="run", **PACES[pace],
    )  # fmt: skip


# -- the hit ----------------------------------------------------------------------------------------------------------


class Hit:
    """Replaces what writes by what counts its calls, and acts at the k-th. k = 0 only counts."""

    def __init__(self, kind, k, seed):
        self.kind, self.k, self.calls, self.full = kind, k, 0, False
        self.random = random.Random(seed)

    def install(self):
        self._wrap(io, "open", lambda path, mode="r", *a, **k: set(mode) & set("wax+"))
        builtins.open = io.open
        for name in ("fsync", "replace", "rename", "mkdir"):
            self._wrap(os, name, lambda *a, **k: True)
        for name in ("unlink", "rmdir"):
            self._wrap(os, name, lambda *a, **k: True, writes=False)
        self._wrap(lossmith.durable.checkpoint, "save_file", lambda *a, **k: True, path=1)
        self._wrap(pyarrow.parquet, "write_table", lambda *a, **k: True, path=1)
        self._wrap(safetensors.torch, "save_file", lambda *a, **k: True, path=1)

    def _wrap(self, module, name, counts, writes=True, path=0):
        true = getattr(module, name)

        def wrapped(*args, **more):
            if counts(*args, **more):
                self._count(true, args, more, args[path], writes)
            return true(*args, **more)

        setattr(module, name, wrapped)

    def _count(self, true, args, more, path, writes):
        self.calls += 1
        if self.full and writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.calls != self.k:
            return
        if self.kind == "full":
            self.full = True
            if writes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif self.kind == "kill":
            self._tear(true, args, more, path)
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.kind])

    def _tear(self, true, args, more, path):
        """Half of what was being written stands on the disk."""
        if true.__name__ in ("save_file", "write_table") and self.random.random() < 0.7:
            true(*args, **more)
            os.truncate(path, os.path.getsize(path) // 2)
        elif true.__name__ == "fsync" and self.random.random() < 0.5:
            name = os.readlink(f"/proc/self/fd/{path}")
            if name.endswith("metrics.jsonl"):
                os.truncate(name, max(0, os.path.getsize(name) - self.random.randint(1, 200)))


def forked(work, kind="", k=0, seed=0):
    """(exit status, what `work` returned or said) of a fork; the status of a signal is its number, negative."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        status, said = 70, "died"
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        try:
            hit = Hit(kind, k, seed)
            hit.install()
            said = work()
            status = 0
            if kind == "count":
                said = hit.calls
        except FinishedError as error:
            status, said = 3, str(error)
        except LossmithError as error:
            status, said = 2, str(error)
        except KeyboardInterrupt as error:
            status, said = 130, "; ".join(getattr(error, "__notes__", []))
        except SystemExit as error:
            status, said = error.code, "; ".join(getattr(error, "__notes__", []))
        except BaseException as error:
            import traceback

            status, said = 1, "".join(traceback.format_exception(error)[-6:])
        finally:
            os.write(write, json.dumps(said, default=str).encode()[-60_000:])
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, json.loads(said) if said else ""


# -- what a run leaves ------------------------------------------------------------------------------------------------


def left(folder):
    """Everything that must be equal to the bit, and the litter, which must be none."""
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "rollouts").iterdir())}
    found |= {f"policy/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in (folder / "policy").iterdir()}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = ("seconds", "tokens_per_second")
    found["metrics"] = [{k: v for k, v in r.items() if not k.startswith(timing)} for r in records]
    summary = json.loads((folder / "summary.json").read_text())
    found["summary"] = {k: v for k, v in summary.items() if k != "seconds"}
    known = {"recipe.toml", "inputs.json", "metrics.jsonl", "rollouts", "checkpoints", "policy", "summary.json"}
    litter = {p.name for p in folder.iterdir()} - known
    litter |= {p.name for p in (folder / "checkpoints").iterdir() if not p.name.startswith("step-") or p.suffix}
    found["litter"] = sorted(litter)
    return found


def one(arguments):
    """(kind, outcome, details) of one hit and what followed."""
    kind, pace, k, seed, expected, events = arguments
    chance = random.Random(seed)
    runs = Path(tempfile.mkdtemp())
    lossmith.durable.checkpoint.SHARE = 1.0  # tiny runs: by time means now and then
    try:
        recipe = Recipe.make(**settings(runs, pace))
        folder = runs / "run"
        objects = {"prompts": settings(runs, pace)["prompts"]} if len(settings(runs, pace)["prompts"]) > 8 else {}
        status, said = forked(lambda: run_recipe(recipe, console=QUIET) and None, kind, k, seed)
        wrong = problem(kind, status, said)
        if wrong:
            return kind, "bad end", f"k={k} {pace}: {wrong}"
        outcome = "equal"
        if chance.random() < 0.2 and status != 0:
            again = chance.randint(1, events)
            forked(lambda: resume(folder, console=QUIET, **objects) and None, kind, again, seed + 1)
        if not folder.exists() or not (folder / "recipe.toml").exists():
            status, said = forked(lambda: run_recipe(recipe, console=QUIET) and None)
            outcome = "begun anew, equal"
        else:
            status, said = forked(lambda: resume(folder, console=QUIET, **objects) and None)
        if status not in (0, 3):
            return kind, "not resumed", f"k={k} {pace}: {status} {said}"
        found = left(folder)
        different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        return (kind, outcome, "") if not different else (kind, "different", f"k={k} {pace}: {different}")
    finally:
        shutil.rmtree(runs, ignore_errors=True)


def problem(kind, status, said):
    """What is wrong with how the run ended at the hit, or ""."""
    fitting = {"kill": {-9}, "term": {143}, "int": {130}, "full": {2}}[kind] | {0}
    if status not in fitting:
        return f"status {status}: {said}"
    if kind == "full" and status == 2:
        full = "disk is full" in said or "No space left on device" in said
        if not full or "\n" in said.strip():
            return f"not one sentence: {said}"
    if status in (130, 143) and said and "resume" not in said and "finished" not in said:
        return f"does not say how to go on: {said}"
    return ""


def warm():
    """All that a run imports and sets up at first use, short of a backward pass, before the first fork."""
    runs = Path(tempfile.mkdtemp())
    run = open_run(plan(Recipe.make(**settings(runs, "step"))))
    run.start()
    rollouts = sample_and_score(run, run.prompts.batch(0, 2, 0), 0, Clock())
    run.learner.credit(run.learner.make_batch(rollouts))
    for group in run.learner.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    run.learner.optimizer.step()
    run.finish()
    shutil.rmtree(runs)


def sweep(count, seed, kinds, workers=2):
    """{kind: Counter of outcomes}, and what went wrong in detail."""
    tasks = []
    chance = random.Random(seed)
    for pace in PACES:
        runs = Path(tempfile.mkdtemp())
        recipe = Recipe.make(**settings(runs, pace))
        lossmith.durable.checkpoint.SHARE = 1.0
        status, calls = forked(lambda recipe=recipe: run_recipe(recipe, console=QUIET) and None, "count")
        assert status == 0, calls
        expected = left(runs / "run")
        share = count // len(PACES)
        chosen = sorted(chance.sample(range(1, calls + 1), share)) if share <= calls else range(1, calls + 1)
        chosen = [*chosen, *(chance.randint(1, calls) for _ in range(share - len(chosen)))]
        tasks += [(kind, pace, k, chance.randrange(1 << 30), expected, calls) for kind in kinds for k in chosen]
    chance.shuffle(tasks)
    found = []
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for ended in pool.imap_unordered(one, tasks):
            found.append(ended)
            print(f"{len(found)}/{len(tasks)} {' '.join(ended)}", file=sys.stderr, flush=True)
    counts = {kind: collections.Counter(outcome for k, outcome, _ in found if k == kind) for kind in kinds}
    return counts, [f"{kind}: {outcome}: {text}" for kind, outcome, text in found if text]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    given = parser.parse_args()
    warm()
    counts, wrong = sweep(given.count, given.seed, given.kinds, given.workers)
    print(json.dumps(counts, indent=1))
    for line in wrong:
        print(line)
    sys.exit(bool(wrong))

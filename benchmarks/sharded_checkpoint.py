"""What ranks that hold a model in parts take to write a checkpoint and the policy, and to read a checkpoint back.

    python benchmarks/sharded_checkpoint.py            # two ranks on this machine's CPU; a minute, 4 GB

A Llama of random weights in float32, AdamW's state filled by one step. Of each rank: the greatest resident size (VmHWM,
begun anew by /proc/self/clear_refs, so Linux alone) above what it was before, in MB, and seconds on rank 0.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import tempfile
import time
from pathlib import Path

import torch
from planned_memory import SIZES, make

from lossmith.durable.checkpoint import Checkpoint
from lossmith.policy import load_policy, saving
from lossmith.ranks import of_environment
from lossmith.training import Learner, Recipe
from lossmith.training.checkpoint import load_checkpoint, save_checkpoint


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--ranks", type=int, default=2)
    asked.add_argument("--size", choices=list(SIZES), default="60M")
    asked.add_argument("--file-mb", type=int, help="the most that a file of the policy holds, if not 4 GB")
    given = asked.parse_args()
    if given.file_mb:
        saving.FILE_BYTES = given.file_mb * 2**20
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        make(Path(folder) / "model", *SIZES[given.size])
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(given.ranks)}
        free.close()
        os.environ |= place | {"RANK": "0", "LOCAL_RANK": "0"}
        for rank in range(1, given.ranks):
            if os.fork() == 0:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                work(Path(folder))
                os._exit(0)
        work(Path(folder))


def work(folder: Path) -> None:
    """On rank 0, print what was measured on all of them."""
    torch.set_num_threads(1)
    ranks = of_environment()
    recipe = Recipe.make(shard=True, dtype="float32", device="cpu", loss="reinforce", memory_gb=100)
    policy = load_policy(folder / "model", device="cpu", dtype="float32")
    learner = Learner(policy, recipe.policy_loss(), recipe, ranks=ranks)
    ranks.tasks |= {"fill": lambda: fill(learner), "before": before, "most": most}
    if ranks.rank:
        ranks.serve()
        return
    ranks.call("fill")
    count = sum(p.numel() for p in learner.policy.parameters())
    found = {"weights": count, "whole_checkpoint_mb": 12 * count / 2**20, "whole_policy_mb": 4 * count / 2**20}
    kept: list[Checkpoint] = []
    for name, do in {
        "checkpoint written": lambda: kept.append(save_checkpoint(folder, learner, 1)),
        "policy written": lambda: learner.policy.save(folder / "policy"),
        "checksum": lambda: learner.policy.checksum(),
        "checkpoint read": lambda: load_checkpoint(kept[0], learner),
    }.items():
        ranks.call("before")
        begun = time.perf_counter()
        do()
        found[name] = {"seconds": time.perf_counter() - begun, "mb_above_by_rank": ranks.call("most")}
    ranks.end()
    print(json.dumps(found, indent=2))


start = [0]


def before() -> None:
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is given back, and taken again
    Path("/proc/self/clear_refs").write_text("5")
    start[0] = status("VmRSS")


def most() -> float:
    return (status("VmHWM") - start[0]) / 1024


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def fill(learner: Learner) -> None:
    for p in learner.policy.parameters():
        p.grad = torch.ones_like(p)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()

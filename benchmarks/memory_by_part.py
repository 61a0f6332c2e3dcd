"""Where a run's memory goes: what is there at the moment when most is in use, by part.

    python benchmarks/memory_by_part.py [--runs 3] [--prompts 6] [--dtype auto] [--ways default ...] [--out FILE]

Two steps of the default recipe with fewer prompts (six fill two passes, and a pass decides the peak), each run in a
process of its own. A thread looks every 5 ms at what the C library has handed out. At the moment when that is most,
weights, gradients and the optimizer's state are counted; the rest are activations and buffers. What is resident at its
peak beyond all this is unused: freed, and kept. The ways differ in a setting each, and are run in turn.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "no reference": {"loss": "grpo(beta=0)"},
    "512 tokens a pass": {"micro_batch_tokens": 512},
    "2048 tokens a pass": {"micro_batch_tokens": 2048},
}
PARTS = ("libraries", "weights", "reference", "gradients", "AdamW", "activations and buffers", "unused")


_COUNTS = "arena ordblks smblks hblks hblkhd usmblks fsmblks used free keep"  # of glibc's mallinfo2


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _COUNTS.split(" ")]


def handed_out() -> int:
    """Bytes that the program has from glibc's malloc."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return int(found.used + found.hblkhd)


def resident() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


@dataclass
class Watch:
    """The most that was in use, and what was what at that moment."""

    known: dict[str, Any] = field(default_factory=dict)  # part -> tensors, asked for each time
    phase: str = "start"
    most: int = 0
    at_most: dict[str, Any] = field(default_factory=dict)
    by_phase: dict[str, list[int]] = field(default_factory=dict)  # most handed out, most resident
    over: bool = False

    def look(self) -> None:
        now, there = handed_out(), resident()
        so_far = self.by_phase.get(self.phase, [0, 0])
        self.by_phase[self.phase] = [max(now, so_far[0]), max(there, so_far[1])]
        if now > self.most:
            self.most = now
            parts = {name: size_of(tensors()) for name, tensors in list(self.known.items())}
            self.at_most = {"phase": self.phase, "resident": there, "parts": parts}

    def run(self) -> None:
        while not self.over:
            self.look()
            time.sleep(0.005)


def size_of(tensors: Iterable[Any]) -> int:
    """Bytes of distinct memory."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}.values()
    )


def worker(settings: dict[str, Any]) -> None:
    """One run; prints what its memory was made of."""
    import torch

    from lossmith.training import Recipe
    from lossmith.training.loop import learn
    from lossmith.training.prepare import open_run, plan

    torch.set_num_threads(settings.pop("threads"))
    x = torch.randn(256, 256)
    x @ x  # what the kernels themselves take
    checked = plan(Recipe.make(**settings))
    libraries, before = resident(), handed_out()
    watch = Watch()
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        watch.phase = "loading"
        run = open_run(checked)
        learner = run.learner
        own = list(run.policy.model.parameters())
        watch.known = {
            "weights": lambda: own,
            "reference": lambda: [] if learner.reference is None else list(learner.reference.model.parameters()),
            "gradients": lambda: [p.grad for p in own],
            "AdamW": lambda: [t for s in list(learner.optimizer.state.values()) for t in s.values() if t.dim()],
        }
        run.tell = lambda what, done, total: setattr(watch, "phase", what)
        seconds = [step.seconds | step.update.seconds for step in learn(run)]
        watch.phase = "after the last step"
        watch.look()
    finally:
        watch.over = True
        thread.join()
        run.close()
    parts = {"libraries": libraries, **watch.at_most["parts"]}
    on_heap = sum(size for name, size in watch.at_most["parts"].items() if name != "weights")  # those are mapped
    parts["activations and buffers"] = watch.most - before - on_heap
    peak = max(there for _, there in watch.by_phase.values())
    parts["unused"] = peak - sum(parts.values())
    compute = str(run.policy.compute_dtype).removeprefix("torch.")
    found = {"peak": peak, "phase": watch.at_most["phase"], "parts": parts, "by_phase": watch.by_phase}
    print(json.dumps(found | {"seconds": seconds, "compute": compute}), flush=True)


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Of a run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps({**settings, "runs": folder})
        command = [sys.executable, __file__, "--worker", given]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Medians of the runs, GB."""
    lines = ["| way | peak resident (range) | in | " + " | ".join(PARTS) + " |", "|---" * (3 + len(PARTS)) + "|"]
    for way, runs in results.items():
        peaks = [r["peak"] / 1e9 for r in runs]
        cells = [f"{statistics.median(r['parts'][part] for r in runs) / 1e9:.2f}" for part in PARTS]
        peak = f"{statistics.median(peaks):.2f} ({min(peaks):.2f} to {max(peaks):.2f})"
        lines.append(f"| {way} | {peak} | {runs[0]['phase']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory_by_part.json")
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    from machine import description

    common = {
        "steps": 2, "prompts_per_step": given.prompts, "held_out": 2, "dtype": given.dtype,
        "checkpoint_minutes": 0, "threads": given.threads,
    }  # fmt: skip
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in given.ways}
    for _ in range(given.runs):
        for way in given.ways:
            results[way].append(measure({**common, **WAYS[way]}))
            print(way, json.dumps(results[way][-1]), flush=True)
            given.out.write_text(json.dumps({"machine": description(), "results": results}, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()

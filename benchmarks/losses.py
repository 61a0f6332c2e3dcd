"""What a loss costs in time and memory, next to the same loss written by hand in plain torch.

    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/losses.py [NAME ...] [--json FILE] [--runs 9] [--presets]

Forward and backward on one thread, float32 [256, 512], ragged rows, groups of 8. Two comparisons:

objective   with the advantage given: `loss(batch)` against the listing `loss.code()` from its advantage on
full        from rewards to gradient: `loss(batch)` against the whole listing, whose group statistics are N x N
            matrices and whose GAE is a loop over tokens; for the reader, it is no lower bound

Both are medians over interleaved runs; "+ build" includes making the Batch, which checks and masks every field.
Memory is the peak of live bytes above the inputs, in tensors of [N, T] float32. `handwritten.py` holds some losses as a
person writes them, so that the listing can be seen not to be slow itself. Metrics are lazy and are not asked for.
Exit code 1: a loss costs more than three times its minimal version, or the two sides give different numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from handwritten import HANDWRITTEN
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lossmith.losses import CATALOGUE, Batch, Loss, PolicyLoss, Zero, example_loss

N, T, GROUP = 256, 512, 8
LEAVES = ("logp", "value", "entropy", "full_kl")  # what carries gradient
TARGET = 3.0  # times the minimal version
SPREAD = "A = A if A.ndim == 2 else A[:, None].expand(mask.shape)"  # the listing's last line about advantages
Run = Callable[[], Tensor]


def random_fields(n: int = N, t: int = T, seed: int = 0) -> dict[str, Tensor]:
    """Every field a loss may ask for; tokens stand at the left of their rows, no row is empty."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    logp = -0.05 - 2 * torch.rand(n, t, generator=draw)
    lengths = torch.randint(t // 8, t + 1, (n,), generator=draw)
    near = {name: (logp + 0.1 * normal(n, t)).clamp(max=-1e-3) for name in ("old_logp", "behavior_logp", "ref_logp")}
    return near | {
        "logp": logp,
        "mask": torch.arange(t) < lengths[:, None],
        "full_kl": normal(n, t).abs(),
        "reward": normal(n),
        "group": torch.arange(n) // GROUP,
        "advantage": normal(n),
        "value": normal(n, t),
        "old_value": normal(n, t),
        "returns": normal(n, t),
        "entropy": normal(n, t).abs(),
        "truncated": lengths == t,
        "baseline": normal(n),
        "reward_greedy": normal(n),
        "reward_parts": normal(n, 2),
        "reference_reward": normal(n, 5),
        "sum_prob_sq": torch.rand(n, t, generator=draw),
        "potential": normal(n, t),
        "off_policy": torch.arange(n) % 3 == 1,
        "lag": torch.arange(n) % 3,
    }


# -- the two sides -----------------------------------------------------------------------------------------------------


def objective_listing(code: str) -> str:
    """The listing from its advantage on, with `advantage` [N] given and a given target of the critic."""
    lines = [line.removeprefix("    ") for line in code.splitlines()[1:]]
    if SPREAD in lines:
        start = lines.index(SPREAD) + 1
        helpers = _helpers(lines[:start])
        lines = ["T = mask.sum(1)", *helpers, "A = advantage[:, None].expand(mask.shape)", *lines[start:]]
    lines = ["G = returns" if line.startswith("G = ") else line for line in lines]
    rest = "\n".join(lines)
    if re.search(r"\bR\b", rest) and "R = reward" not in rest:
        lines.insert(0, "R = reward")
    return "\n".join(["def minimal(logp, mask, **fields):", *("    " + line for line in lines)])


def _helpers(lines: list[str]) -> list[str]:
    """The functions defined among these lines."""
    found: list[str] = []
    inside = False
    for line in lines:
        inside = line.startswith("def ") or (inside and line.startswith(" "))
        found += [line] if inside else []
    return found


def compiled(code: str) -> tuple[Callable[..., Tensor], set[str]]:
    """(the listing as a function, names of the fields it reads)."""
    reads = {f.name for f in fields(Batch)} & set(re.findall(r"\w+", code))
    # every listing is called alike: the fields it reads, by name
    head = f"def listing({', '.join(sorted(reads | {'logp', 'mask'}))}):"
    space: dict[str, Any] = {"torch": torch}
    exec("\n".join([head, *code.splitlines()[1:]]), space)
    return space["listing"], reads


@dataclass
class Side:
    """Functions of no arguments that make the loss; with their leaves, forward and backward can be run."""

    run: Run
    leaves: list[Tensor]

    def __call__(self) -> Tensor:
        loss = self.run()
        torch.autograd.grad(loss, self.leaves, allow_unused=True)
        return loss


def plain(code: str, given: dict[str, Tensor]) -> Side:
    function, reads = compiled(code)
    used = {name: x for name, x in with_leaves(given).items() if name in reads | {"logp", "mask"}}
    return Side(lambda: function(**used), leaves_of(used))


def with_leaves(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x.clone().requires_grad_() if k in LEAVES else x for k, x in given.items()}


def leaves_of(given: dict[str, Tensor]) -> list[Tensor]:
    return [x for x in given.values() if x.requires_grad]


def lossmith(loss: Loss, given: dict[str, Tensor]) -> tuple[Side, Side]:
    """(with a batch that is there already, building the batch included)."""
    own = with_leaves(given)
    batch = Batch(**own)
    leaves = [x for name in LEAVES if (x := getattr(batch, name)) is not None]
    return Side(lambda: loss(forgetful(batch)).loss, leaves), Side(lambda: loss(Batch(**own)).loss, leaves_of(own))


def forgetful(batch: Batch) -> Batch:
    """The batch without what an earlier run has cached in it: every run counts its tokens itself."""
    for name in set(vars(batch)) - {f.name for f in fields(Batch)}:
        del vars(batch)[name]
    return batch


def fields_for(loss: Loss, code: str, every: dict[str, Tensor], objective: bool) -> dict[str, Tensor]:
    """What the loss needs and nothing else: a batch with more in it would cost more to check."""
    reads = compiled(code)[1]
    wanted = {"logp", "mask"} | reads | {f for f in loss.needs if f in every}
    if not objective:
        wanted -= {"advantage", "returns"} - loss.needs
    elif "advantage" in reads:
        estimator = {"old_value", "baseline", "reward_greedy", "reward_parts", "sum_prob_sq", "potential"}
        wanted -= estimator - reads  # the advantage is given
    return {name: every[name] for name in wanted}


def objective_of(loss: Loss) -> Loss:
    """The loss without what a given advantage bypasses."""
    in_reward = isinstance(loss, PolicyLoss) and loss.kl.active and loss.kl.place == "reward"
    return loss.replace(beta=0.0, kl_control="fixed") if in_reward else loss


# -- measuring ---------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Freed memory stays with the process: else glibc gives it back and fetches it again on every run, or does not,
    as the layout of the heap will have it, and that costs more than most losses."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes held by storages that were made while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)}
        made = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(made):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in before:
                self._add(x.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known[key] = weakref.finalize(storage, self._gone, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self.known.pop(key, None)
        self.now -= size


def peak_tensors(side: Side) -> float:
    """Peak extra memory of forward and backward, in float32 [N, T] tensors."""
    with LiveBytes() as live:
        side()
    return live.peak / (4 * N * T)


def timed(sides: dict[str, Side], runs: int) -> dict[str, list[float]]:
    """Milliseconds of every run of each, in turn so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(runs + 2):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if i >= 2:  # the first two runs warm up
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def ratio_of(a: list[float], b: list[float]) -> float:
    """Median over the runs of how many times as long a took as the b next to it."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


@dataclass
class Row:
    """Milliseconds, and memory in [N, T] tensors; None: the loss takes no advantage, or nothing was written by hand."""

    name: str
    objective: float  # lossmith, advantage given where the loss takes one
    built: float  # the same, building the batch included
    minimal: float  # the listing
    ratio: float
    memory: float
    memory_minimal: float
    full: float
    full_minimal: float
    full_ratio: float
    handwritten: float | None
    agrees: bool  # both sides give the same number


def measure(name: str, loss: Loss, every: dict[str, Tensor], runs: int) -> Row:
    part = objective_of(loss)
    code = objective_listing(part.code())
    given = fields_for(part, code, every, objective=True)
    ours, built = lossmith(part, given)
    sides = {"objective": ours, "built": built, "minimal": plain(code, given)}
    if name in HANDWRITTEN:
        own = with_leaves(given)
        sides["handwritten"] = Side(lambda: HANDWRITTEN[name](own), leaves_of(own))
    takes = isinstance(loss, PolicyLoss) and not isinstance(loss.advantage, Zero)
    if takes:
        whole = fields_for(loss, loss.code(), every, objective=False)
        sides |= {"full": lossmith(loss, whole)[0], "full_minimal": plain(loss.code(), whole)}
    at = {key: float(side().detach()) for key, side in sides.items()}
    # float32; the random draw of Clip-Cov hangs on the last digit of an advantage that each side computes itself
    pairs = [("objective", "minimal", 1e-4), ("objective", "handwritten", 1e-4), ("full", "full_minimal", 1e-3)]
    agrees = all(abs(at[a] - at[b]) <= tol * max(1, abs(at[b])) for a, b, tol in pairs if a in at and b in at)
    times = timed(sides, runs)
    ms = {key: statistics.median(x) for key, x in times.items()}
    full, full_minimal = ("full", "full_minimal") if takes else ("objective", "minimal")
    return Row(
        name=name,
        objective=ms["objective"],
        built=ms["built"],
        minimal=ms["minimal"],
        ratio=ratio_of(times["objective"], times["minimal"]),
        memory=peak_tensors(ours),
        memory_minimal=peak_tensors(sides["minimal"]),
        full=ms[full],
        full_minimal=ms[full_minimal],
        full_ratio=ratio_of(times[full], times[full_minimal]),
        handwritten=ms.get("handwritten"),
        agrees=agrees,
    )


def chosen(names: list[str], presets: bool) -> dict[str, Loss]:
    """{name: loss}; of entries with the same composition only the first, unless presets are all asked for."""
    found: dict[str, Loss] = {}
    seen: set[str] = set()
    for name in names or CATALOGUE:
        loss = example_loss(name, max_length=T)
        same = json.dumps({k: v for k, v in loss.to_dict().items() if k != "name"}, sort_keys=True)
        if names or presets or same not in seen:
            found[name] = loss
        seen.add(same)
    return found


def table(rows: list[Row]) -> None:
    print(f"{'':24}{'objective, ms':^42}{'[N, T] tensors':^18}{'full, ms':^24}")
    print(
        f"{'loss':24}{'lossmith':>9}{'+ build':>9}{'minimal':>8}{'by hand':>8}{'ratio':>8}"
        f"{'ours':>9}{'minimal':>9}{'lossmith':>9}{'listing':>8}{'ratio':>7}"
    )
    for row in sorted(rows, key=lambda r: -r.ratio):
        hand = "" if row.handwritten is None else f"{row.handwritten:.2f}"
        print(
            f"{row.name:24}{row.objective:9.2f}{row.built:9.2f}{row.minimal:8.2f}{hand:>8}{row.ratio:8.2f}"
            f"{row.memory:9.1f}{row.memory_minimal:9.1f}{row.full:9.2f}{row.full_minimal:8.2f}{row.full_ratio:7.2f}"
            f"{'' if row.agrees else '  the two sides differ'}"
        )
    ratios = [row.ratio for row in rows]
    print(f"median ratio {statistics.median(ratios):.2f}, above {TARGET:g}x: {sum(r > TARGET for r in ratios)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="losses; all if not given")
    parser.add_argument("--presets", action="store_true", help="presets with the composition of another entry too")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="write the rows there; - for the terminal, instead of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    gc.disable()  # collections would fall on some runs and not on others
    every = random_fields()
    rows = []
    for name, loss in chosen(options.names, options.presets).items():
        rows.append(measure(name, loss, every, options.runs))
        gc.collect()
    text = json.dumps([asdict(row) for row in rows], indent=1)
    if options.json == "-":
        print(text)
    else:
        table(rows)
        if options.json:
            with open(options.json, "w") as file:
                file.write(text)
    return int(any(row.ratio > TARGET or not row.agrees for row in rows))


if __name__ == "__main__":
    sys.exit(main())

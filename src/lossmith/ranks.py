"""Several processes at one run. Rank 0 makes it; the others do their share of the work whenever it asks for it.

torch.distributed carries what they say: gloo for objects and on the CPU, nccl between GPUs. Under torchrun the ranks
are its processes; `lossmith train --ranks N` starts N - 1 beside its own.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lossmith.errors import LossmithError, RunError

__all__ = ["Ranks", "local_rank", "of_environment", "started"]

PATIENCE = datetime.timedelta(minutes=30)  # for a rank that neither answers nor ends; one that ends is noticed at once
BUCKET = 2**23  # numbers that travel together


class Ranks:
    """The ranks of this run, as one of them sees them. A run of one process has one, which it asks for everything."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.tasks: dict[str, Callable[..., Any]] = {}
        self.at_work = False  # what was asked for is not done
        self._torn = False  # ... and never will be: the others wait in the middle of it

    def call(self, task: str, *given: Any) -> list[Any]:
        """What the task gives on each rank, in their order; called on rank 0 alone. Raises what it raised on any."""
        if self.size == 1:
            return [self.tasks[task](*given)]
        if self.at_work:
            raise RunError(
                "the ranks were stopped in the middle of work that they share: nothing more can be asked of them."
            )
        self.at_work = True
        self._say((task, given))
        return self._do(task, given)

    def serve(self) -> None:
        """On the other ranks: do what rank 0 asks for, until it has no more."""
        while (asked := self._say(None)) is not None:
            with contextlib.suppress(Exception):  # rank 0 has heard of it, and ends the run or goes on
                self._do(*asked)

    def end(self) -> None:
        """The others may go. Of a run that failed they hear when rank 0 is gone."""
        if self.size > 1 and self.rank == 0:
            self._say(None)

    def _say(self, words: Any) -> Any:
        box = [words]
        with _in_words(self.rank):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def _do(self, task: str, given: Sequence[Any]) -> list[Any]:
        """On rank 0, what the task gives on each rank."""
        result, error = _attempt(lambda: self.tasks[task](*given))
        said = None if error is None else (_portable(error), "".join(traceback.format_exception(error)))
        if error is not None and self._torn:
            raise error
        outcomes: list[Any] | None = None if self.rank else [None] * self.size
        with _in_words(self.rank):
            dist.gather_object((result, said), outcomes, dst=0)
        self.at_work = False
        if error is not None and not isinstance(error, _OtherRankError):
            raise error
        for rank, (_, wrong) in enumerate(outcomes or ()):
            if wrong is not None and not isinstance(wrong[0], _OtherRankError):
                raise _told(rank, *wrong)
        return [result for result, _ in outcomes or ()]

    # -- within a task: every rank calls these, in the same order ------------------------------------------------------

    def together(self, work: Callable[[], Any]) -> Any:
        """work(), on every rank, before any of them goes on: where it fails on one, the others do not wait for it."""
        if self.size == 1:
            return work()
        result, error = _attempt(work)
        failed_on: list[Any] = [None] * self.size
        dist.all_gather_object(failed_on, error is not None)
        if error is not None:
            raise error
        if any(failed_on):
            raise _OtherRankError(f"rank {failed_on.index(True)} failed")
        return result

    def in_step(self, work: Callable[[], Any]) -> Any:
        """work(), in which the ranks meet again and again: where one fails, the others wait in the middle of it.

        So it cannot be told: the rank ends, with its own traceback, which the others notice at once.
        """
        try:
            return work()
        except Exception as error:
            self._torn = True
            if self.rank:
                traceback.print_exc()
                raise SystemExit(1) from None
            words = _last_words()
            if words or isinstance(error, dist.DistError) or "gloo/transport" in str(error):  # gloo has no class for it
                raise RunError(f"a rank has ended or does not answer: {words or error}") from error
            raise

    def most(self, count: int) -> int:
        """The largest of the ranks' counts."""
        box = torch.tensor(count)
        if self.size > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors of one shape, the same on every rank."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """On rank 0, the sum of all ranks' gradients; the others keep none. A gradient that no rank has stays none."""
        if self.size == 1:
            return
        there = self.add_up(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32))
        known = [p for p, ranks in zip(parameters, there.tolist(), strict=True) if ranks]
        for bucket in _buckets(known):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            dist.reduce(flat, dst=0)
            for p, piece in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = piece.view_as(p).clone() if self.rank == 0 else None

    @torch.no_grad()
    def copy_from_first(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """On every rank, the parameters as they are on rank 0."""
        if self.size == 1:
            return
        for bucket in _buckets(parameters):
            flat = torch.cat([p.detach().flatten() for p in bucket])
            dist.broadcast(flat, src=0)
            if self.rank:
                for p, piece in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                    p.copy_(piece.view_as(p))

    def agree(self, what: str, mine: Mapping[str, Any]) -> None:
        """RunError, on every rank: the ranks were not given the same; says which field differs, and where."""
        if self.size == 1:
            return
        given: list[Any] = [None] * self.size
        with _in_words(self.rank):
            dist.all_gather_object(given, dict(mine))
        for rank, theirs in enumerate(given):
            for key in sorted(given[0].keys() | theirs.keys()):
                ours, its = given[0].get(key), theirs.get(key)
                if ours != its:
                    raise RunError(
                        f"the ranks do not agree on {what}: {key} is {ours!r} on rank 0 and {its!r} on rank {rank}. "
                        "Give every rank the same."
                    )


class _OtherRankError(Exception):
    """A task was given up here because it failed on another rank, which tells why."""


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """(what it gives, None), or (None, why it failed): the other ranks are to hear of it before anything is raised."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters of one type, as many as travel together."""
    held: list[torch.nn.Parameter] = []
    size = 0
    for p in sorted(parameters, key=lambda p: str(p.dtype)):
        if held and (p.dtype != held[0].dtype or size + p.numel() > BUCKET):
            yield held
            held, size = [], 0
        held.append(p)
        size += p.numel()
    if held:
        yield held


def _portable(error: Exception) -> Exception:
    """An error as another process can hear it."""
    if isinstance(error, _OtherRankError) or (isinstance(error, LossmithError) and len(error.args) == 1):
        return error
    return RunError(f"{type(error).__name__}: {error}")


def _told(rank: int, error: Exception, trace: str) -> Exception:
    error.add_note(f"(on rank {rank})" if isinstance(error, LossmithError) else f"rank {rank}:\n{trace}")
    return error


@contextlib.contextmanager
def _in_words(rank: int) -> Iterator[None]:
    """RunError: a rank is gone, or has not answered for half an hour."""
    try:
        yield
    except RuntimeError as error:
        if rank:  # rank 0 has ended, and said why
            raise SystemExit(1) from None
        raise RunError(f"a rank has ended or does not answer: {_last_words() or error}") from None


# -- which rank this process is ---------------------------------------------------------------------------------------


def of_environment() -> Ranks:
    """The rank that torchrun, or `started`, has made this process; without either, the only one.

    RunError: the ranks do not find each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    rank = int(os.environ["RANK"])
    if not dist.is_initialized():
        try:
            dist.init_process_group(_backend(), timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:  # a port in use, a host that is not there
            raise RunError(f"rank {rank} of {size} does not find the others: {error}") from None
    return Ranks(rank, size)


def local_rank() -> int:
    """Its number on this machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


_WORKERS: list[tuple[int, subprocess.Popen[bytes], Path]] = []  # that this process has started: rank, and what it wrote


def _last_words() -> str:
    """What the workers that have ended wrote last."""
    said = []
    for rank, process, log in _WORKERS:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        if process.poll():
            lines = log.read_text(errors="replace").strip().splitlines()
            said.append(f"rank {rank} ended with {process.returncode}: " + " | ".join(lines[-8:]))
    return "; ".join(said)


@contextlib.contextmanager
def started(size: int, command: Sequence[str]) -> Iterator[Ranks]:
    """This process as rank 0, and beside it size - 1 others that run the command, each its own rank.

    They are of a session of their own, so that Ctrl-C reaches rank 0 alone, which ends them.
    """
    gpus = torch.cuda.device_count()
    if gpus and size > gpus:
        raise RunError(f"--ranks {size}: this machine has {gpus} GPUs, and every rank needs one.")
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    threads = max(1, (os.cpu_count() or 1) // size)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(size)}
    place["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is there already: connect to it
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(1, size):
            log = Path(folder) / f"rank-{rank}.log"
            given = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(threads)}
            with log.open("wb") as sink:
                process = subprocess.Popen(
                    [sys.executable, "-m", "lossmith", *command], env=given, stdin=subprocess.DEVNULL,
                    stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            _WORKERS.append((rank, process, log))
        before, known = torch.get_num_threads(), dict(os.environ)
        torch.set_num_threads(threads)
        os.environ |= place | {"RANK": "0", "LOCAL_RANK": "0"}
        try:
            yield of_environment()
        finally:
            torch.set_num_threads(before)
            os.environ.clear()
            os.environ.update(known)
            if dist.is_initialized():
                dist.destroy_process_group()  # whoever still waits for this rank hears that it is gone
            for _, process, _ in _WORKERS:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
                process.wait()
            _WORKERS.clear()

"""Memory: what the C library does with freed blocks, and how much a process may take."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

__all__ = ["available_bytes", "keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
_MOST = (1 << 31) - 1


@cache
def keep_freed_memory() -> bool:
    """Let freed blocks stay with the process, where glibc would hand large ones back at once.

    Tensors of tens of megabytes are freed and allocated again hundreds of times a step, and each time the system would
    have to zero their pages: a third of a step's time on a CPU. Peak memory is the same. True where it took effect.
    """
    if not sys.platform.startswith("linux") or os.environ.get("LD_PRELOAD"):  # another allocator may be there
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MOST)) and bool(mallopt(_TRIM_THRESHOLD, _MOST))


def available_bytes() -> int | None:
    """Memory that is free for this process, or None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:")]
    limit = _control_group_limit()
    return min([*free, *([limit] if limit else [])], default=None)


def _control_group_limit() -> int | None:
    """What a container leaves: its limit less what is taken."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(int(limit) - used, 0)

"""A folder, or a file, that one process works in at a time."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lossmith.errors import RunError

__all__ = ["lock", "unlock"]

_HELD: dict[tuple[int, int], int] = {}  # (device, inode) -> the handle that holds its lock


def lock(folder: Path) -> None:
    """Keep other processes out until `unlock`, or until this process ends, however it ends.

    RunError: another process is in it. Where the file system or the machine knows no locks, nobody is kept out.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    handle = os.open(folder, os.O_RDONLY)  # itself: no file to be left behind
    status = os.fstat(handle)
    key = (status.st_dev, status.st_ino)
    if key in _HELD:  # this process has it, from a run that was stopped
        os.close(handle)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise RunError(
                f"another process is working in {str(folder)!r}. Wait for it, or stop it first: one at a time."
            ) from None
        return
    _HELD[key] = handle


def unlock(folder: Path) -> None:
    """Let other processes in again."""
    if folder.exists():
        status = folder.stat()
        handle = _HELD.pop((status.st_dev, status.st_ino), None)
        if handle is not None:
            os.close(handle)

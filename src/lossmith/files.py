"""Files: read whatever program wrote them, written whole or not at all, and a failure is one sentence.

Everything that Lossmith reads or writes for a user goes through here, so that a byte order mark, a `~`, a full disk or
an unwritable folder is handled the same way everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from lossmith.errors import LossmithError, PolicyError, RunError

__all__ = [
    "append_line",
    "at_home",
    "cache_folder",
    "check_writable",
    "explain_write_errors",
    "in_groups",
    "read_text",
    "replace_atomically",
    "sha256",
    "sync",
    "text_at_home",
    "write_atomically",
]

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EBADF}  # nothing is there, and that is an answer
_FULL = {errno.ENOSPC, errno.EDQUOT}


def at_home(path: str | Path, error: type[LossmithError] = RunError) -> Path:
    """The path, `~` being the home folder; whether something is there can then be asked without an exception.

    `error`: there is no such user, the name is too long or holds a NUL, or a folder on the way may not be entered.
    """
    try:
        place = Path(path).expanduser()
        place.stat()
    except RuntimeError:
        raise error(f"{str(path)!r}: no home folder is known for its '~'. Write the path out.") from None
    except (OSError, ValueError) as problem:
        if getattr(problem, "errno", None) not in _ABSENT:
            reason = getattr(problem, "strerror", None) or problem
            shown = str(path) if len(str(path)) < 100 else str(path)[:60] + "..."
            raise error(f"{shown!r} cannot be a path here: {reason}.") from None
    return place


def text_at_home(text: str, error: type[LossmithError]) -> str:
    """A text that may name a path, or something in a file (`~/a.py:function`); other texts stay as they are."""
    return str(at_home(text, error)) if text.startswith("~") else text


def cache_folder() -> Path:
    """$LOSSMITH_CACHE, or ~/.cache/lossmith."""
    return at_home(os.environ.get("LOSSMITH_CACHE") or "~/.cache/lossmith", PolicyError)


def sha256(path: Path) -> str:
    """Of the bytes of a file, in hexadecimal. OSError: it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | Path, error: type[LossmithError], what: str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; `what` it is ("recipe file"), for the message.

    `error`: it is missing, a folder, unreadable, or not UTF-8 (and in which line).
    """
    place = at_home(path, error)
    try:
        data = place.read_bytes()
    except FileNotFoundError:
        raise error(f"there is no {what} {str(path)!r}.") from None
    except IsADirectoryError:
        raise error(f"{str(path)!r} is a folder, and a {what} is a file.") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"the {what} {str(path)!r} cannot be read: {reason}.") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = problem.object.count(b"\n", 0, problem.start) + 1
        raise error(f"{path}:{line}: not UTF-8 (byte {problem.start}). Save the {what} as UTF-8.") from None


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the name of `path`, flushed to disk, once the block is done.

    RunError: it cannot be written (a full disk, say). Then `path` is what it was before.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with explain_write_errors(path):
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all, as readable as the user's umask says. RunError: it cannot be written."""
    with replace_atomically(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def append_line(path: Path, line: str) -> None:
    """Append one line, flushed to disk; one that does not fit is removed again. RunError: it cannot be written."""
    with explain_write_errors(path), path.open("ab") as file:
        before = file.tell()
        try:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), before)
            raise


@contextlib.contextmanager
def explain_write_errors(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong with writing inside the block is a RunError of one sentence that names `path`.

    Libraries wrap the system's errors in their own: those of safetensors, pyarrow and tokenizers are recognized by
    their text.
    """
    try:
        yield
    except LossmithError:
        raise
    except Exception as problem:
        number = problem.errno if isinstance(problem, OSError) else None
        if number in _FULL or "No space left on device" in str(problem) or "os error 28" in str(problem):
            raise RunError(
                f"the disk is full: {str(path)!r} could not be written. Nothing that was written before is lost; "
                "free some space and go on."
            ) from None
        if not isinstance(problem, OSError):
            raise
        raise RunError(f"{str(path)!r} cannot be written: {problem.strerror or problem}.") from None


def check_writable(path: str | Path, error: type[LossmithError] = RunError, *, new: bool = False) -> Path:
    """The path with its folder made, tried before any work is done for it. `error`: nothing can be written there.

    new: a file that exists is refused, because its contents may be valuable.
    """
    place = at_home(path, error)
    if place.is_dir():
        raise error(f"{str(path)!r} is a folder; give the name of a file in it.")
    if new and os.path.lexists(place):
        raise error(f"{str(path)!r} exists, and is not overwritten. Choose another file.")
    probe = place.with_name(f".{place.name}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        if isinstance(problem, FileExistsError | NotADirectoryError):
            reason = "a folder on the way to it is a file"
        raise error(f"nothing can be written to {str(path)!r}: {reason}. Choose another place.") from None
    return place


def in_groups(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in their order, as many together as have at most so many bytes, which each file then holds."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


def sync(path: Path) -> None:
    """Flush a file or a folder's list of names to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle of a folder to flush
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

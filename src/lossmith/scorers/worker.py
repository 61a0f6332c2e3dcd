"""The child process that holds one scoring function. It is run as a script, by `process.Worker`, and by nobody else.

It imports the standard library and two files, `function.py` and `user_code.py`, never the package: a worker must start
quickly and must not run the caller's own script again, which is what multiprocessing's "spawn" does to a script
without a `__main__` guard.

Over the pipe: pickles go in (the parent is trusted), JSON comes out (a scorer's process need not be).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import queue
import signal
import struct
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import IO, Any

__all__ = ["read_frame", "write_frame"]

_LENGTH = struct.Struct(">Q")


def write_frame(stream: IO[bytes], payload: bytes) -> None:
    """Write one message: its length (8 bytes), then itself."""
    stream.write(_LENGTH.pack(len(payload)) + payload)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """Read one message, or None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    payload = stream.read(length)
    return payload if len(payload) == length else None


def serve() -> None:
    """Load the function named by the first message, then answer every further message, a batch, with verdicts."""
    requests, replies = _take_over_pipes()
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, inbox), daemon=True).start()

    def reply(message: Any) -> None:
        write_frame(replies, json.dumps(message, default=str).encode())

    first = pickle.loads(inbox.get())
    sys.path[:] = first["sys_path"]
    here = Path(__file__).parent
    user_code = _load("lossmith.user_code", here.with_name("user_code.py"))
    function = _load("lossmith.scorers.function", here / "function.py")
    try:
        caller = function.Caller(user_code.load_object(first["path"], as_main=True))
    except user_code.LoadFailure as failure:
        reply({"failed": str(failure), "name": failure.name, "known": failure.known})
        return
    reply({"loaded": caller.signature})
    while True:
        batch = pickle.loads(inbox.get())
        try:
            reply({"verdicts": caller(batch)})
        except function.CallFailure as failure:
            reply({"raised": str(failure), "divisible": failure.divisible})


def _take_over_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Keep stdin and stdout for the protocol alone; what the function prints goes to stderr, where it can be read."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _listen(requests: IO[bytes], inbox: queue.SimpleQueue[bytes]) -> None:
    """Pass messages on. The end of the stream means that the parent has gone: then go too, even in mid-batch."""
    while (payload := read_frame(requests)) is not None:
        inbox.put(payload)
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():  # the function may have started processes of its own
        with contextlib.suppress(OSError):
            os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


def _load(name: str, file: Path) -> ModuleType:
    """The file under the name that the package gives it, so that whoever imports that gets the same module."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Serve, then leave at once: a normal exit would wait for the thread that is reading from the parent."""
    try:
        serve()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()

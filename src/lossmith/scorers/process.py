"""The parent's handle on a worker: start it, ask it with a wall clock, kill it."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import IO, Any

import psutil

from lossmith.errors import ScorerError, nearest, printable
from lossmith.scorers.function import CallFailure, ScorerBatch, Signature, Verdict
from lossmith.scorers.worker import read_frame, write_frame

__all__ = ["Worker"]

STARTUP_SECONDS = 180.0  # a scorer that imports torch on a busy machine is slow, not broken
POLL_SECONDS = 0.5  # between looks at whether a silent process is still there


class Worker:
    """One child process that holds one scoring function, `"file.py:name"` or `"module:name"`.

    It has the parent's folder, sys.path and environment (without LOSSMITH_SCORER_KEY, LOSSMITH_JUDGE_KEY and
    LOSSMITH_PASSWORD). It lives from batch to batch, is killed with everything it
    started when a batch takes too long, starts again at the next batch, and never outlives its parent.
    """

    def __init__(self, path: str, startup: float = STARTUP_SECONDS) -> None:
        self.path = path
        self.startup = startup
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._end: weakref.finalize[..., Any] | None = None

    def start(self) -> Signature:
        """Start the process and load the function. ScorerError where it does not load, or not in time."""
        self.stop()
        process = subprocess.Popen(
            # -P: this file's folder stays off the child's path, where http.py would hide the library's http
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=os.name == "posix",  # Ctrl-C is the parent's to handle; and the group can be killed
            env=_environment(),
        )
        self._process = process
        self._replies = queue.SimpleQueue()
        output_thread = threading.Thread(target=_show, args=(process.stderr,), daemon=True)
        output_thread.start()
        self._end = weakref.finalize(self, _kill, process, output_thread)  # also runs when the interpreter exits
        threading.Thread(target=_listen, args=(process.stdout, self._replies), daemon=True).start()
        try:
            answer = self._exchange({"path": self.path, "sys_path": list(sys.path)}, self.startup)
        except TimeoutError:
            raise ScorerError(
                f"scorer {self.path!r}: importing it took longer than {self.startup:g} s. Move slow work (downloads, "
                "servers) out of the module's top level."
            ) from None
        except EOFError as error:
            raise ScorerError(f"scorer {self.path!r}: its process died while importing it: {error}.") from None
        if "failed" in answer:
            self.stop()
            hint = nearest(answer["name"], answer["known"]) if answer["known"] else ""
            raise ScorerError(f"scorer {self.path!r}: {answer['failed']}{hint}")
        return answer["loaded"]

    def ask(self, batch: ScorerBatch, timeout: float | None) -> list[Verdict]:
        """One verdict per completion, within `timeout` seconds, a restart not counted. CallFailure: there are none."""
        if self._process is None:
            self.start()
        try:
            answer = self._exchange(batch, timeout)
        except TimeoutError:
            raise CallFailure(
                f"timeout: no answer within {round(timeout or 0, 2):g} s; the worker was killed"
            ) from None
        except EOFError as died:
            raise CallFailure(f"worker died: {died}", divisible=True) from None
        if "raised" in answer:
            raise CallFailure(answer["raised"], answer["divisible"])
        return answer["verdicts"]

    def stop(self) -> None:
        """Kill the process and everything it started. It starts again when asked."""
        if self._end is not None:
            self._end()
        self._process = None

    def _next_reply(self, process: subprocess.Popen[bytes], timeout: float | None) -> bytes | None:
        """None once the process has ended. What it started may hold its pipe open, so that no end of it is seen."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = math.inf if end is None else end - time.monotonic()
            ended = process.poll() is not None
            with contextlib.suppress(queue.Empty):
                return self._replies.get(timeout=max(0.0, min(left, POLL_SECONDS)))
            if ended:
                return None
            if left <= POLL_SECONDS:
                raise queue.Empty

    def _exchange(self, message: Any, timeout: float | None) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            with contextlib.suppress(OSError):  # a dead worker: the end of its replies says so below
                write_frame(process.stdin, pickle.dumps(message))
            answer = self._next_reply(process, timeout)
        except queue.Empty:
            self.stop()
            raise TimeoutError from None
        except BaseException:  # Ctrl-C, or a column that cannot be pickled: its late answer must never be read
            self.stop()
            raise
        if answer is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)  # it is ending by itself: let it keep its own exit code
            self.stop()
            raise EOFError(_ending(process.returncode))
        return json.loads(answer)


def _environment() -> dict[str, str]:
    """The parent's, without the keys that are Lossmith's own business."""
    own = ("LOSSMITH_SCORER_KEY", "LOSSMITH_JUDGE_KEY", "LOSSMITH_PASSWORD")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)}


def _listen(stream: IO[bytes], replies: queue.SimpleQueue[bytes | None]) -> None:
    with stream:
        while (payload := read_frame(stream)) is not None:
            replies.put(payload)
    replies.put(None)


def _show(stream: IO[bytes]) -> None:
    """Pass on what the function prints, with its control characters shown: it may well print completions."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with stream:
        while data := os.read(stream.fileno(), 1 << 16):
            lines = decoder.decode(data).split("\r")  # progress bars go back to the beginning of the line
            with contextlib.suppress(OSError, ValueError):  # nobody listens
                sys.stderr.write("\r".join(map(printable, lines)))
                sys.stderr.flush()


def _kill(process: subprocess.Popen[bytes], output_thread: threading.Thread) -> None:
    """Kill the process and all that it started, wait for it and its last output, and close our end of its input."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):  # also those that left its group
        children = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(OSError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    process.wait()
    output_thread.join(1.0)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"

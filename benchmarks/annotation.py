"""The annotation page under load: annotators who answer, beside clients that stall. Loopback only.

    python benchmarks/annotation.py [--annotators 20] [--answers 40] [--stalled 1000] [--think 0.1] [--out FILE]

Server, annotators and stalled clients are a process each. Every annotator keeps a connection, thinks for up to twice
`--think` seconds, and answers; the time of an answer is from the click to the acknowledgement, after which it is on
the disk. The stalled clients hold their connections open (nothing sent, half a head, half a body) and connect again
whenever they are dropped. At the end every acknowledged answer is looked up in the judgement file.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import statistics
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from lossmith.feedback.output_set import OutputSet, named
from lossmith.feedback.page import serve
from lossmith.feedback.store import Store
from lossmith.prompts import Prompt

HEAD = b"POST /answer HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\n"
STALLED = (b"", b"GET / HT", HEAD, HEAD + b"Content-Length: 100\r\n\r\nid=1")
AT_ONCE = 50  # stalled clients that connect at the same time


def serving(path: Path, sets: list[OutputSet], links: Queue[str], said: Path) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    serve(sets, path, question="rating", on_ready=links.put)


# -- stalled clients --------------------------------------------------------------------------------------------------


def stalling(port: int, count: int, held: Any, dropped: Any) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 200), hard))
    asyncio.run(_stall(port, count, held, dropped))


async def _stall(port: int, count: int, held: Any, dropped: Any) -> None:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(k: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                async with gate:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(STALLED[k % len(STALLED)])
                held.value += 1
                try:
                    while await reader.read(65536):
                        pass
                finally:
                    held.value -= 1
                    dropped.value += 1
                    writer.close()
            await asyncio.sleep(random.uniform(0.5, 1.5))

    await asyncio.gather(*map(one, range(count)))


# -- annotators -------------------------------------------------------------------------------------------------------


class Browser:
    """One connection, kept alive; opened again where the server closed it."""

    def __init__(self, port: int) -> None:
        self.port, self.cookie = port, ""
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, method: str, path: str, **fields: str) -> tuple[int, str]:
        """(status, body)."""
        body = urlencode(fields).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nCookie: {self.cookie}\r\n"
        if method == "POST":
            head += f"Origin: http://127.0.0.1:{self.port}\r\nContent-Length: {len(body)}\r\n"
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            return await self._exchange(head.encode() + b"\r\n" + body)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.writer.close()
            self.writer = None
            raise

    async def _exchange(self, request: bytes) -> tuple[int, str]:
        assert self.reader is not None and self.writer is not None
        self.writer.write(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"content-length: (\d+)", head, re.I)
        body = await self.reader.readexactly(int(length[1]) if length else 0)
        cookie = re.search(r"set-cookie: ([^;]+)", head, re.I)
        self.cookie = cookie[1] if cookie else self.cookie
        return int(head.split()[1]), body.decode()


def annotating(links: list[str], answers: int, think: float, found: Queue[Any]) -> None:
    found.put(asyncio.run(_all_answer(links, answers, think)))


async def _all_answer(links: list[str], answers: int, think: float) -> list[dict[str, Any]]:
    return await asyncio.gather(*(_answer(k, link, answers, think) for k, link in enumerate(links)))


async def _answer(k: int, link: str, answers: int, think: float) -> dict[str, Any]:
    rng, browser = random.Random(k), Browser(urlsplit(link).port or 0)
    browser.cookie = link.rpartition("#")[2]
    said: dict[str, int] = {}
    times: list[float] = []
    pages: list[float] = []
    again = 0
    csrf = ""
    while len(said) < answers:
        try:
            began = time.perf_counter()
            status, html = await browser.ask("GET", "/")
            pages.append(time.perf_counter() - began)
            csrf = re.search(r'name="csrf" value="([^"]*)"', html)[1]  # type: ignore[index]
            if "Who is judging?" in html:
                await browser.ask("POST", "/name", csrf=csrf, name=f"person {k}")
                continue
            asked = re.search(r'id="answer".*?name="id" value="(\w+)"', html, re.S)[1]  # type: ignore[index]
            await asyncio.sleep(rng.uniform(0, 2 * think))
            value = rng.randint(1, 5)
            began = time.perf_counter()
            status, _ = await browser.ask("POST", "/answer", csrf=csrf, id=asked, value=str(value))
            if status == 303:
                times.append(time.perf_counter() - began)
                said[asked] = value
        except (ConnectionError, asyncio.IncompleteReadError):
            again += 1
    return {"said": said, "times": times, "pages": pages, "again": again}


# -- the run ----------------------------------------------------------------------------------------------------------


def measure(annotators: int, answers: int, stalled: int, think: float) -> dict[str, Any]:
    """Counts, and the times of answers and pages in milliseconds."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path, terminal = Path(folder) / "judgements.db", Path(folder) / "stderr"
        links: Queue[str] = context.Queue()
        server = context.Process(target=serving, args=(path, _sets(answers), links, terminal), daemon=True)
        server.start()
        link = links.get(timeout=60)
        inside = [asyncio.run(_enter(link := _next(link, links, k))) for k in range(annotators)]
        held, dropped = context.Value("i", 0), context.Value("i", 0)
        port = urlsplit(link).port or 0
        crowd = context.Process(target=stalling, args=(port, stalled, held, dropped), daemon=True)
        crowd.start()
        _until(lambda: held.value >= 0.95 * stalled)
        found: Queue[Any] = context.Queue()
        work = context.Process(target=annotating, args=(inside, answers, think, found), daemon=True)
        began = time.perf_counter()
        work.start()
        people = found.get(timeout=590)
        seconds = time.perf_counter() - began
        counts = {"stalled_held": held.value, "stalled_dropped": dropped.value}
        for process in (work, crowd, server):
            process.kill()
            process.join()
        return _report(path, terminal, people, seconds) | counts


def _sets(answers: int) -> list[OutputSet]:
    prompts = [Prompt(f"Question {k}?") for k in range(answers // 4 + 2)]
    return [OutputSet(p, tuple(named(p, f"Answer {n}. " * 40) for n in range(4))) for p in prompts]


def _next(link: str, links: Queue[str], k: int) -> str:
    """The link that has not been used yet."""
    return link if k == 0 else links.get(timeout=10)


async def _enter(link: str) -> str:
    """Use the link; the address with the session's cookie behind it."""
    browser = Browser(urlsplit(link).port or 0)
    await browser.ask("GET", "/?" + urlsplit(link).query)
    assert browser.writer is not None
    browser.writer.close()
    return f"{link.partition('?')[0]}#{browser.cookie}"


def _until(done: Any) -> None:
    end = time.monotonic() + 60
    while not done() and time.monotonic() < end:
        time.sleep(0.05)


def _report(path: Path, terminal: Path, people: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    acknowledged = {name: value for p in people for name, value in p["said"].items()}
    with Store(path) as store:
        stored = {j.id: j.value for j in store.judgements()}
    return {
        "annotators": len(people),
        "acknowledged": len(acknowledged),
        "lost_or_wrong": sum(stored.get(name) != value for name, value in acknowledged.items()),
        "stored": len(stored),
        "connections_lost": sum(p["again"] for p in people),
        "seconds": round(seconds, 1),
        "answer_ms": _percentiles([t for p in people for t in p["times"]]),
        "page_ms": _percentiles([t for p in people for t in p["pages"]]),
        "lines_on_the_terminal": len(terminal.read_text().splitlines()),
    }


def _percentiles(times: list[float]) -> dict[str, float]:
    cut = statistics.quantiles(times, n=100, method="inclusive")
    found = {"p50": cut[49], "p95": cut[94], "p99": cut[98], "max": max(times)}
    return {name: round(1000 * value, 1) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotators", type=int, default=20)
    parser.add_argument("--answers", type=int, default=40, help="of each annotator")
    parser.add_argument("--stalled", type=int, default=1000)
    parser.add_argument("--think", type=float, default=0.1, help="mean seconds from the page to the click")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = measure(given.annotators, given.answers, given.stalled, given.think)
    found |= {"stalled": given.stalled, "think": given.think, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    print(json.dumps(found, indent=2))
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

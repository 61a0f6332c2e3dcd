"""A scorer behind an address: what is tried again, what one failed call costs, and where its key goes and does not."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import lossmith as ls
import tiny
from lossmith.errors import RecipeError, ScorerError
from lossmith.scorers import ScorerSettings, check_scorer, load_scorer, score_rollouts, web
from lossmith.scorers.address import Address, redacted, shown
from lossmith.scorers.http import HttpScorer
from lossmith.training import Recipe
from test_rewards import rollout


class Scripted(ThreadingHTTPServer):
    """Scores a text by its length; `answer(request number, body, headers)` may give (status, headers, body) instead."""

    daemon_threads = True

    def __init__(self, answer=lambda number, body, headers: None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked, self.lock = answer, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.now = self.most = 0  # requests under way
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((time.monotonic(), self.path, dict(self.headers), body))
            number = len(server.asked)
            server.now += 1
            server.most = max(server.most, server.now)
        answer = server.answer(number, body, self.headers)
        with server.lock:
            server.now -= 1  # before it is told: whoever has the answer may ask the next at once
        if answer == "hang up":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            good = (200, {}, {"scores": [float(len(text)) for text in body["completions"]]})
            status, headers, reply = answer or good
            payload = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(payload))}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(web, "BACKOFF_SECONDS", 0.005)
    for name in ("LOSSMITH_SCORER_KEY", "LOSSMITH_SCORER_KEY_2"):
        monkeypatch.delenv(name, raising=False)
    running = []

    def start(*args):
        running.append(Scripted(*args))
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def texts(*completions):
    return [rollout(text) for text in completions]


def ask(url, *completions, timeout=20.0, **settings):
    scorer = load_scorer(url, settings=ScorerSettings(**settings))
    return [r.score for r in score_rollouts(scorer, texts(*completions), on_error="drop", timeout=timeout)]


def values(scores):
    return [score.value for score in scores]


# --- what is tried again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("after", [None, "0", "0.02", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"])
def test_a_busy_server_is_asked_again(serve, status, after):
    headers = {} if after is None else {"Retry-After": after}
    server = serve(lambda number, body, _: (status, headers, "slow down") if number < 3 else None)
    assert values(ask(server.url, "a", "bb")) == [1.0, 2.0]
    assert len(server.asked) == 3


def test_a_connection_that_breaks_is_made_again(serve):
    server = serve(lambda number, body, _: "hang up" if number < 3 else None)
    assert values(ask(server.url, "a")) == [1.0]


def test_a_server_that_is_not_up_yet_is_waited_for(serve, monkeypatch):
    monkeypatch.setattr(web, "BACKOFF_SECONDS", 0.05)
    server = serve()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    scorer = load_scorer(f"http://127.0.0.1:{port}")
    Late = type("Late", (ThreadingHTTPServer,), {"daemon_threads": True, "allow_reuse_address": True})
    started = []

    def start():
        late = Late(("127.0.0.1", port), Handler)
        late.answer, late.asked, late.lock, late.now, late.most = server.answer, [], threading.Lock(), 0, 0
        started.append(late)
        late.serve_forever(0.01)

    threading.Timer(0.1, start).start()
    assert values([r.score for r in score_rollouts(scorer, texts("abc"))]) == [3.0]
    started[0].shutdown()
    started[0].server_close()


def test_the_server_says_how_long_to_wait_in_seconds_or_as_a_date():
    assert web._seconds("120") == 120 and web._seconds("1.5") == 1.5
    assert web._seconds(email.utils.formatdate(time.time() + 90, usegmt=True)) == pytest.approx(90, abs=2)
    assert [web._seconds(x) for x in (None, "", "-3", "nan", "soon", email.utils.formatdate(0, usegmt=True))] == [0] * 6


def test_no_longer_is_waited_than_the_limit_and_the_message_says_so(serve):
    server = serve(lambda *_: (429, {"Retry-After": "3600"}, "slow down"))
    start = time.monotonic()
    (score,) = ask(server.url, "a", timeout=5.0)
    assert time.monotonic() - start < 3 and len(server.asked) == 1
    assert "status 429" in score.error and "asks to wait 3600 s; no time is left to try again within" in score.error


def test_a_server_that_says_when_is_asked_until_the_time_is_over(serve):
    server = serve(lambda number, *_: (429, {"Retry-After": "0.001"}, "") if number <= 20 else None)
    assert values(ask(server.url, "a")) == [1.0]


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_a_refusal_is_final(serve, status):
    server = serve(lambda *_: (status, {}, "no"))
    scores = ask(server.url, "a", "bb")
    assert len(server.asked) == 1
    assert all(f"status {status}" in score.error for score in scores)
    assert all(("LOSSMITH_SCORER_KEY" in score.error) == (status in (401, 403)) for score in scores)


@pytest.mark.parametrize("timeout", [0.5, 60.0, 300.0])
def test_scorer_timeout_reaches_the_request(monkeypatch, timeout):
    seen = []
    monkeypatch.setattr(web.Server, "post", lambda self, body, limit, patient: seen.append(limit) or b'{"scores": [1]}')
    ask("http://host/x", "a", timeout=timeout)
    assert seen == [timeout]
    HttpScorer("http://host/x").score(texts("a"))
    assert seen[1] == 60.0


# --- what one failed call costs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 413, 422, 500])
def test_one_completion_at_fault_costs_itself(serve, status):
    server = serve(lambda number, body, _: (status, {}, "cannot") if "bad" in body["completions"] else None)
    scores = ask(server.url, "a", "bb", "bad", "dddd", "eeeee")
    assert values(scores) == [1.0, 2.0, None, 4.0, 5.0]
    assert f"status {status}" in scores[2].error
    with pytest.raises(ScorerError, match=r"failed on 1 of 3(.|\n)*completion: 'bad'"):
        score_rollouts(load_scorer(server.url), texts("a", "bad", "ccc"))


def test_a_batch_too_large_is_sent_in_parts(serve):
    server = serve(lambda number, body, _: (413, {}, "") if len(body["completions"]) > 2 else None)
    assert values(ask(server.url, *"abcdefg")) == [1.0] * 7


def test_a_null_or_an_error_among_the_scores_costs_itself(serve):
    reply = {"scores": [1, None, {"error": "no \x1b[31mparse"}, "abstain", "high", True]}
    scores = ask(serve(lambda *_: (200, {}, reply)).url, *"abcdef")
    assert values(scores) == [1.0, None, None, None, None, 1.0]
    assert scores[1].error.startswith("none: the server sent null")
    assert scores[2].error == "http: the server says 'no \ufffd[31mparse'"
    assert scores[3].abstained and scores[3].error is None
    assert scores[4].error.startswith("not a number: 'high'")


def test_no_nan_is_sent(serve):
    server = serve()
    scorer = load_scorer(server.url)
    score_rollouts(scorer, [rollout("a", weight=float("nan"), parts=[1.0, {"x": float("inf")}])])
    assert server.asked[0][3]["columns"] == {"parts": [[1.0, {"x": "inf"}]], "weight": [None]}


# --- how often -------------------------------------------------------------------------------------------------------


def test_completions_go_in_calls_of_a_size_and_so_many_at_once(serve):
    server = serve(lambda number, body, _: time.sleep(0.05))
    assert values(ask(server.url, *["x" * k for k in range(1, 8)], parallel=3, batch=2)) == [1, 2, 3, 4, 5, 6, 7]
    assert sorted(len(body["completions"]) for *_, body in server.asked) == [1, 2, 2, 2]
    assert server.most == 3
    server.most = 0
    ask(server.url, "a", "b", "c", batch=1)
    assert server.most == 1


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    time = monotonic

    def sleep(self, seconds):
        self.now += seconds


def test_no_minute_has_more_calls_than_agreed_and_waiting_for_it_is_no_fault_of_the_server(monkeypatch):
    clock, asked = Clock(), []
    monkeypatch.setattr(web, "time", clock)
    server = web.Server(Address.of("http://host"), per_minute=2, wait=clock.sleep)

    def once(body, timeout):
        asked.append((clock.now, timeout))
        if len(asked) == 2:
            raise web.NoAnswer("busy", 503)
        return b""

    server._once = once
    for _ in range(4):
        server.post(b"", 5.0)
    backoff = web.BACKOFF_SECONDS
    assert [when for when, _ in asked] == [100, 100, 160, 160, 220]  # a try again is a call
    assert [left for _, left in asked] == pytest.approx([5, 5, 5 - backoff + backoff, 5, 5], abs=backoff)


# --- redirections ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [307, 308])
def test_the_same_request_is_made_where_the_server_points(serve, monkeypatch, status):
    monkeypatch.setenv("LOSSMITH_SCORER_KEY", "the-key")
    server = serve(lambda number, *_: (status, {"Location": "/score/"}, "") if number == 1 else None)
    assert values(ask(server.url + "/score", "ab")) == [2.0]
    assert [path for _, path, *_ in server.asked] == ["/score", "/score/"]
    assert [headers["Authorization"] for _, _, headers, _ in server.asked] == ["Bearer the-key"] * 2


def test_the_key_does_not_follow_to_another_server(serve, monkeypatch):
    monkeypatch.setenv("LOSSMITH_SCORER_KEY", "the-key")
    other = serve()
    server = serve(lambda *_: (307, {"Location": other.url + "/x"}, ""))
    assert values(ask(server.url, "ab")) == [2.0]
    assert "Authorization" not in other.asked[0][2]


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirection_that_would_lose_the_batch_is_refused(serve, status):
    server = serve(lambda *_: (status, {"Location": "/there"}, ""))
    (score,) = ask(server.url, "ab")
    assert f"status {status}" in score.error and "it points to /there: give that address" in score.error


# --- keys ------------------------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment(serve, monkeypatch):
    server = serve()
    ask(server.url, "a")
    assert "Authorization" not in server.asked[0][2]
    monkeypatch.setenv("LOSSMITH_SCORER_KEY", " the-key\n")
    ask(server.url, "a")
    assert server.asked[1][2]["Authorization"] == "Bearer the-key"
    monkeypatch.setenv("LOSSMITH_SCORER_KEY", "two\nlines")
    with pytest.raises(ScorerError, match="LOSSMITH_SCORER_KEY holds a line break") as caught:
        ask(server.url, "a")
    assert "two" not in str(caught.value)


@pytest.mark.parametrize(("user", "pair"), [("me:p%40ss", "me:p@ss"), ("token", "token:"), ("me:a:b", "me:a:b")])
def test_user_and_password_in_an_address_are_basic_authorization(serve, user, pair):
    server = serve()
    assert values(ask(server.url.replace("://", f"://{user}@"), "a")) == [1.0]
    scheme, _, code = server.asked[0][2]["Authorization"].partition(" ")
    assert scheme == "Basic" and base64.b64decode(code).decode() == pair
    assert "@" not in server.asked[0][2]["Host"]


def test_an_address_may_name_its_key(serve, monkeypatch):
    server = serve()
    url = server.url + "/score?key=${LOSSMITH_SCORER_KEY}&user=me"
    with pytest.raises(ScorerError, match="needs its key: put it into the variable LOSSMITH_SCORER_KEY"):
        check_scorer(url)
    monkeypatch.setenv("LOSSMITH_SCORER_KEY", "a+b/c&d")
    ask(url, "a")
    _, path, headers, _ = server.asked[0]
    assert path == "/score?key=a%2Bb%2Fc%26d&user=me" and "Authorization" not in headers
    monkeypatch.setenv("HOME_SECRET", "mine")
    with pytest.raises(ScorerError, match="not 'HOME_SECRET'"):
        check_scorer(server.url + "/${HOME_SECRET}")


SECRET = "sk-live-5ecret"
HOLDING = [
    "http://HOST/score?key=SECRET",
    "http://HOST/score?model=small&api_key=SECRET&max_tokens=48",
    "http://HOST/score?x=SECRET",
    "http://HOST/score?SECRET",
    "http://HOST/v1/SECRET/score",
    "http://me:SECRET@HOST/score",
    "http://SECRET@HOST/score",
    "http://me:SECRET@HOST/score?accessToken=SECRET",
]


@pytest.mark.parametrize("form", HOLDING)
def test_a_key_in_an_address_works_and_is_written_nowhere(serve, monkeypatch, tmp_path, form):
    server = serve(lambda *_: None)
    url = form.replace("HOST", server.url[7:]).replace("SECRET", SECRET)
    assert values(ask(url, "a")) == [1.0]
    as_asked = server.asked[0]

    kept = Recipe.make(scorer=url, watch={"scorers": [url, "length"]}).as_toml()
    assert SECRET not in json.dumps(kept) and kept["watch"]["scorers"] == [kept["scorer"], "length"]
    with pytest.raises(ScorerError, match="LOSSMITH_SCORER_KEY") as caught:
        check_scorer(kept["scorer"])
    assert SECRET not in str(caught.value)
    secrets = []
    redacted(url, secrets)
    for number, secret in enumerate(secrets, 1):
        monkeypatch.setenv("LOSSMITH_SCORER_KEY" + (f"_{number}" if number > 1 else ""), secret)
    assert values(ask(kept["scorer"], "a")) == [1.0]  # a resumed run
    again = server.asked[1]
    assert again[1] == as_asked[1] and again[2].get("Authorization") == as_asked[2].get("Authorization")


@pytest.mark.parametrize("form", HOLDING)
def test_a_server_that_quotes_the_key_does_not_get_it_shown(serve, form):
    def answer(number, body, headers):
        replies = [(401, {}, f"bad key {SECRET}"), (200, {}, f"<{SECRET}>"), (302, {"Location": f"/?key={SECRET}"}, "")]
        return replies[number - 1] if number < 4 else (200, {}, {"scores": [{"error": f"key {SECRET}"}]})

    url = form.replace("HOST", serve(answer).url[7:]).replace("SECRET", SECRET)
    for _ in range(4):
        (score,) = ask(url, "a")
        assert score.error and SECRET not in score.error
    assert SECRET not in load_scorer(url).name and SECRET not in repr(Address.of(url))


@pytest.mark.parametrize(
    "spec",
    [
        f"http://me:{SECRET}@host:port/x",
        f"http://me:{SECRET}@/x",
        f"http://host/x y?key={SECRET}",
        f"htps://me:{SECRET}@host/score",
        f"http:/me:{SECRET}@host/score",
        f"me:{SECRET}@host/score",
        f"http://[::1/x?key={SECRET}",
        f"HTTP://host:99999/?key={SECRET}",
        {"scorers": f"http://host/?key={SECRET}"},
    ],
)
def test_an_address_that_cannot_work_is_refused_without_its_key(spec):
    with pytest.raises(ScorerError) as caught:
        check_scorer(spec)
    assert SECRET not in str(caught.value)


def test_what_is_no_key_stays():
    for url in (
        "http://host:8000/score?model=qwen2.5&max_tokens=48&author=me&monkey=1",
        "https://host/v1/rewards/helpful",
        "http://host/score?key=${LOSSMITH_SCORER_KEY}",
        "http://[::1]:80/",
    ):
        assert redacted(url, []) == url
        assert shown(f"no answer from {url}") == f"no answer from {url}"
    spec = {"scorers": ["length", "a.py:f"], "weights": [1, 0.5], "standardize": True}
    assert redacted(spec, []) == spec


def test_two_keys_get_two_variables():
    recipe = Recipe.make(scorer="http://a/?key=one-key", watch="http://b/?token=other-key")
    kept = recipe.as_toml()
    assert kept["scorer"] == "http://a/?key=${LOSSMITH_SCORER_KEY}"
    assert kept["watch"] == "http://b/?token=${LOSSMITH_SCORER_KEY_2}"


def test_a_run_keeps_no_key_and_goes_on_with_the_one_of_the_environment(serve, monkeypatch, tmp_path, caplog, capfd):
    def answer(number, body, headers):
        return (429, {"Retry-After": "0.01"}, f"{SECRET} is too fast") if number % 3 == 1 else None

    caplog.set_level("DEBUG")
    server = serve(answer)
    address = server.url.replace("://", f"://me:{SECRET}@") + f"/score?key={SECRET}2"
    run = ls.train(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=[f"Prompt {i}?" for i in range(6)], held_out=2,
        scorer=address, watch={"scorers": [address]}, steps=2, prompts_per_step=2, samples_per_prompt=4, max_tokens=6,
        runs=str(tmp_path), name="r", scorer_parallel=2, scorer_batch=1,
    )  # fmt: skip
    assert run.summary["steps"] == 2
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        assert SECRET.encode() not in file.read_bytes(), file
    out, err = capfd.readouterr()
    assert SECRET not in out + err + caplog.text
    assert "will be asked: 127.0.0.1" in out and "to resume the run, put it into LOSSMITH_SCORER_KEY" in out

    kept = Recipe.read(run.folder.path / "recipe.toml")
    with pytest.raises(ScorerError, match="needs its key: put it into the variable LOSSMITH_SCORER_KEY"):
        check_scorer(kept["scorer"])
    monkeypatch.setenv("LOSSMITH_SCORER_KEY", f"me:{SECRET}")
    monkeypatch.setenv("LOSSMITH_SCORER_KEY_2", SECRET + "2")
    ask(kept["scorer"], "a")
    (_, path, headers, _), (_, path_again, headers_again, _) = server.asked[0], server.asked[-1]
    assert path == path_again and headers["Authorization"] == headers_again["Authorization"]


def test_limits_are_recipe_keys():
    recipe = Recipe.make(scorer_parallel=4, scorer_per_minute=30, scorer_batch=1, steps=10, prompts_per_step=8)
    settings = recipe.scorer_settings(40)
    assert (settings.parallel, settings.per_minute, settings.batch) == (4, 30, 1)
    assert (settings.updates, settings.passes) == (10, 2.0)
    with pytest.raises(RecipeError, match="scorer_parallel = 0"):
        Recipe.make(scorer_parallel=0)


# --- the docs --------------------------------------------------------------------------------------------------------


def test_the_example_server_of_the_docs_works():
    text = (Path(__file__).parents[1] / "docs" / "scorers.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "HTTPServer" in block]
    body, last = code.rstrip().rsplit("\n", 1)
    assert last.startswith("http.server.") and last.endswith(".serve_forever()")
    names: dict = {}
    exec(body, names)
    with ThreadingHTTPServer(("127.0.0.1", 0), names["Scorer"]) as server:
        names["Scorer"].log_message = lambda *_: None
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        assert values(ask(f"http://127.0.0.1:{server.server_port}", "a b", "a b a")) == [2.0, 2.0]
        server.shutdown()

"""The annotation page, without a browser: who comes in, what is written, what is refused, and that nothing is lost."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import types
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import httpx
import pytest
from fastapi.testclient import TestClient

from lossmith.errors import FeedbackError
from lossmith.feedback.judgement import Judgement
from lossmith.feedback.output_set import OutputSet, named, write_sets
from lossmith.feedback.page import accounts, add_account, make_app, serve
from lossmith.feedback.page.accounts import Throttle, matches
from lossmith.feedback.page.work import Desk, items_of
from lossmith.feedback.store import Store
from lossmith.prompts import Prompt
from lossmith.serving import connections
from lossmith.serving.text import visible

HOST = "http://127.0.0.1:8000"


def a_set(name="Why is the sky blue?", texts=("Because of air.", "Scattering.", "It is not.")):
    prompt = Prompt(name, {}, "here")
    return OutputSet(prompt, tuple(named(prompt, text) for text in texts))


SETS = [a_set(f"Question {k}?", (f"first {k}", f"second {k}", f"third {k}")) for k in range(3)]


class Person:
    """A browser without scripts."""

    def __init__(self, app, name=None, enter=True, address="testclient"):
        self.app, self.page = app, app.state.page
        self.client = TestClient(app, base_url=HOST, follow_redirects=True, client=(address, 50000))
        if enter:
            self.client.get("/", params={"token": self.page.sessions.token})
        if name:
            self.post("/name", name=name)

    def html(self):
        return self.client.get("/").text

    def field(self, name, within=None):
        html = self.html()
        html = html.partition(within)[2] if within else html
        found = re.search(rf'name="{name}" value="([^"]*)"', html)
        return unescape(found[1]) if found else None

    def post(self, path, csrf=None, headers=None, **fields):
        body = {"csrf": self.field("csrf") if csrf is None else csrf, **fields}
        return self.client.post(path, data=body, headers={"origin": HOST} | (headers or {}))

    def answer(self, **fields):
        return self.post("/answer", **{"id": self.field("id", 'id="answer"'), **fields})

    def undo(self):
        return self.post("/undo", id=self.field("id", 'action="/undo"'))


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "judgements.db", patience=0.05) as opened:
        yield opened


def app_of(store, question="rating", sets=SETS, **more):
    return make_app(store, sets, question=question, **more)


# -- coming in --------------------------------------------------------------------------------------------------------


def test_the_link_works_once_and_the_next_one_is_announced(store):
    said = []
    app = app_of(store, announce=said.append)
    token = app.state.page.sessions.token
    first = TestClient(app, base_url=HOST)
    answer = first.get("/", params={"token": token}, follow_redirects=False)
    assert answer.status_code == 303 and token not in answer.headers["location"]
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert "Who is judging?" in first.get("/").text

    again = TestClient(app, base_url=HOST).get("/", params={"token": token})
    assert again.status_code == 403 and "used before" in again.text and "terminal" in again.text
    assert said == [app.state.page.sessions.token] and said[0] != token
    assert TestClient(app, base_url=HOST).get("/", params={"token": said[0]}).status_code == 200


def test_a_browser_that_is_in_uses_no_link_up(store):
    person = Person(app_of(store), "Ada")
    token = person.page.sessions.token
    assert person.client.get("/", params={"token": token}).status_code == 200
    assert person.page.sessions.token == token


def test_a_prefetch_does_not_use_the_link_up(store):
    app = app_of(store)
    token = app.state.page.sessions.token
    ahead = TestClient(app, base_url=HOST).get("/", params={"token": token}, headers={"sec-purpose": "prefetch"})
    assert ahead.status_code == 403 and app.state.page.sessions.token == token


@pytest.mark.parametrize("path", ["/", "/?token=", "/?token=wrong", "/?token=%00%ff"])
def test_without_the_link_nobody_comes_in(store, path):
    answer = Person(app_of(store), enter=False).client.get(path)
    assert answer.status_code == 403 and "Question" not in answer.text


@pytest.mark.parametrize("path", ["/answer", "/undo", "/name", "/leave", "/login"])
def test_without_a_session_nothing_can_be_posted(store, path):
    answer = Person(app_of(store), enter=False).post(path, csrf="x", name="Eve", value="3")
    assert answer.status_code == 403 and store.judgements() == []


@pytest.mark.parametrize("csrf", ["", "wrong", "\ud800", "é"])
def test_a_post_needs_the_token_of_its_session(store, csrf):
    person = Person(app_of(store), "Ada")
    body = urlencode({"csrf": csrf, "id": person.field("id", 'id="answer"'), "value": "3"}, errors="surrogatepass")
    answer = person.client.post("/answer", content=body)
    assert answer.status_code == 403 and store.judgements() == []


def test_the_token_may_stand_in_a_header(store):
    person = Person(app_of(store), "Ada")
    token = person.field("csrf")
    assert person.answer(csrf="", value="3", headers={"x-csrf-token": token}).status_code == 200
    assert len(store.judgements()) == 1


@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.example"}, {"origin": "http://127.0.0.1:1"}, {"sec-fetch-site": "cross-site"}],
)
def test_a_post_from_another_origin_is_refused(store, headers):
    person = Person(app_of(store), "Ada")
    assert person.answer(value="3", headers=headers).status_code == 403
    assert store.judgements() == []


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:8000", "", "[::bad"])
def test_an_unknown_host_is_refused(store, host):
    person = Person(app_of(store), "Ada")
    answer = person.client.get("/", headers={"host": host})
    assert answer.status_code == 403 and "Question" not in answer.text


def test_every_answer_forbids_everything_but_itself(store):
    person = Person(app_of(store), "Ada")
    for path in ("/", "/static/page.js", "/nowhere"):
        headers = person.client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers
    html = person.html()
    assert not re.search(r"\son\w+=|\sstyle=|<script>|https?://", html)  # nothing inline, nothing from elsewhere


@pytest.mark.parametrize("stated", [True, False])
def test_a_request_has_a_limit(store, stated):
    person = Person(app_of(store), "Ada")
    body = urlencode({"csrf": person.field("csrf"), "comment": "x" * 70_000}).encode()
    answer = person.client.post("/answer", content=body if stated else iter([body[:40_000], body[40_000:]]))
    assert answer.status_code == 413 and store.judgements() == []


def test_too_many_fields_are_refused(store):
    person = Person(app_of(store), "Ada")
    assert person.client.post("/answer", content="&".join(f"a{k}=1" for k in range(100))).status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/%2e%2e/app.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/page.css%00.js",
        "/static/..\\app.py",
        "/templates/base.html",
        "/openapi.json",
        "/docs",
    ],
)
def test_no_path_reaches_the_file_system(store, path):
    answer = Person(app_of(store), "Ada").client.get(path)
    assert answer.status_code == 404 and "import" not in answer.text and "root:" not in answer.text


def test_names_are_cleaned_and_the_same_person_goes_on(store):
    app = app_of(store)
    ada = Person(app, "  Ada   Lovelace ")
    ada.answer(value="3")
    back = Person(app)
    assert "Ada Lovelace" in back.html()
    back.post("/name", name="ada lovelace")
    back.answer(value="4")
    assert [j.annotator for j in store.judgements()] == ["Ada Lovelace"] * 2
    for wrong in ("", "   ", "a\u202eb", "a\x00", "x" * 61):
        asked = Person(app)
        assert "1 to 60 characters" in asked.post("/name", name=wrong).text
    assert "&lt;b&gt;x&lt;/b&gt;" in Person(app, "<b>x</b>").html()


# -- accounts ---------------------------------------------------------------------------------------------------------


def test_an_account_is_a_salted_hash(store):
    add_account(store, "Ada", "correct horse")
    add_account(store, "Bob", "correct horse")
    ada, bob = (store.accounts()[name] for name in ("Ada", "Bob"))
    assert ada != bob and "horse" not in ada
    with pytest.raises(FeedbackError, match="shorter"):
        add_account(store, "Eve", "short")


def test_with_accounts_people_sign_in(store):
    add_account(store, "Ada", "correct horse")
    app = app_of(store, accounts=True, host="0.0.0.0")
    person = Person(app, enter=False)
    assert "Sign in" in person.html()
    assert "No account has" in person.post("/login", name="Ada", password="wrong").text
    assert "No account has" in person.post("/login", name="Nobody", password="correct horse").text
    assert person.post("/name", name="Ada").status_code == 403
    assert person.answer(value="3").status_code == 403 and store.judgements() == []
    before = dict(person.client.cookies)
    assert "Question" in person.post("/login", name="Ada", password="correct horse").text
    assert dict(person.client.cookies) != before  # a planted session is not signed in
    person.answer(value="3")
    assert store.judgements()[0].annotator == "Ada"
    assert (
        Person(app, enter=False).client.get("/", params={"token": app.state.page.sessions.token}).text.count("Sign in")
    )


def test_wrong_passwords_are_throttled(store):
    add_account(store, "Ada", "correct horse")
    app = app_of(store, accounts=True)
    app.state.page.throttle = Throttle(window=3600)  # as many tries, however slow the machine
    person = Person(app, enter=False)
    for _ in range(5):
        assert person.post("/login", name="Ada", password="guess").status_code == 200
    late = person.post("/login", name="Ada", password="correct horse")
    assert late.status_code == 429 and re.search(r"in [67]\d\d seconds", late.text)  # a fifth of the window
    assert person.post("/login", name="Bob", password="guess").status_code == 200  # another account
    ada = Person(app, enter=False, address="192.0.2.7")
    assert "Question" in ada.post("/login", name="Ada", password="correct horse").text  # the right one is not kept out


def test_guesses_at_the_same_time_count_as_well(store, monkeypatch):
    add_account(store, "Ada", "correct horse")
    app, tried = app_of(store, accounts=True), []
    app.state.page.throttle = Throttle(window=3600)
    monkeypatch.setattr(app.state.page, "knows", lambda *given: tried.append(given) or time.sleep(0.02))

    async def guess(client):
        html = (await client.get("/")).text
        csrf = re.search(r'name="csrf" value="([^"]*)"', html)[1]
        form = {"csrf": csrf, "name": "Ada", "password": "guess"}
        return (await client.post("/login", data=form, headers={"origin": HOST})).status_code

    async def all_at_once():
        transport = httpx.ASGITransport(app=app)
        clients = [httpx.AsyncClient(transport=transport, base_url=HOST, follow_redirects=True) for _ in range(40)]
        return await asyncio.gather(*map(guess, clients))

    codes = asyncio.run(all_at_once())
    assert len(tried) == 5 and codes.count(429) == 35


def test_a_throttle_counts_by_account_by_address_and_all_in_all():
    throttle = Throttle(account=2, address=3, everyone=5, window=600)
    enter = throttle.enter
    assert not enter("a", "ada") and not enter("a", "ada") and enter("a", "ada") == pytest.approx(300, abs=1)
    assert not enter("a", "bob") and enter("a", "bob") == pytest.approx(200, abs=1)  # the address
    throttle.right("a", "ada")
    assert not enter("a", "ada") and enter("a", "ada")
    assert not enter("b", "ada") and not enter("2001:db8::1", "ada") and enter("c", "ada")  # everyone
    several = Throttle(account=1, address=1)
    assert not several.enter("2001:db8::1", "ada") and several.enter("2001:db8::2", "bob")  # one network
    assert not several.enter("2001:db8:0:1::1", "ada")


def test_a_throttle_opens_again_bit_by_bit(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(accounts, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    enter = Throttle(account=5, window=60).enter
    assert [enter("a", "ada") for _ in range(6)] == [0, 0, 0, 0, 0, pytest.approx(12)]
    now[0] += 11.9
    assert enter("a", "ada") == pytest.approx(0.1)
    now[0] += 0.2
    assert not enter("a", "ada") and enter("a", "ada") == pytest.approx(11.9)
    now[0] += 60
    assert [enter("a", "ada") > 0 for _ in range(6)] == [False] * 5 + [True]


def test_an_account_that_is_damaged_lets_nobody_in(store):
    for secret in ("", "x", "16384$8$1$$", "-1$8$1$AAAA$AAAA", "1$1$1$1$1$1"):
        assert not matches("correct horse", secret)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_open_address_needs_the_word_and_accounts(tmp_path, host):
    path = tmp_path / "j.db"
    with pytest.raises(FeedbackError, match="others can reach"):
        serve(SETS, path, question="rating", host=host)
    with pytest.raises(FeedbackError, match="has no accounts"):
        serve(SETS, path, question="rating", host=host, allow_remote=True)


# -- hostile texts ----------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</textarea></div></form><h1>mine</h1>",
    "{{ 7 * 7 }} {% include '/etc/passwd' %}",
    '" onmouseover="alert(1)',
    "&lt;b&gt; &amp;",
]


@pytest.mark.parametrize("question", ["rating", "pair", "ranking"])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_text(store, question, text):
    sets = [a_set(text, (text, text + " "))]
    html = Person(app_of(store, question, sets, criteria=text), text).html()
    read = Elements()
    read.feed(html)
    assert read.texts.count(text.strip()) >= 3  # the prompt, the criteria, an output
    assert {tag for tag, _ in read.found} <= OURS and sum(tag == "h1" for tag, _ in read.found) == 1
    assert all(given.get("src", "").startswith("/static/") for tag, given in read.found if tag == "script")
    assert not [name for _, given in read.found for name in given if name.startswith("on") or name == "style"]


OURS = set(
    re.findall(
        r"\w+",
        "html head meta title link script body div header progress span form input button kbd main h1 h2 details "
        "summary section p article label textarea dialog dl dt dd ol li strong noscript",
    )
)


class Elements(HTMLParser):
    """What a browser would find: elements with their attributes, and texts."""

    def __init__(self):
        super().__init__()
        self.found, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_what_hides_is_shown():
    shown = visible("a\u202eb\x00\x00\x00c\x1b[31m\u200b\ud800\U000e0041\r\n\td\u00ade\u3164")
    for code in ("U+202E", "U+0000 ×3", "U+001B", "U+200B", "U+D800", "U+E0041", "U+00AD", "U+3164"):
        assert f">{code}<" in shown
    assert "\n\td" in shown and not set("\u202e\x00\x1b\u200b\ud800\r") & set(shown)
    assert visible("👨\u200d👩 می\u200cخواهم") == "👨\u200d👩 می\u200cخواهم"  # joiners where they belong
    assert "U+200D" in visible("a\u200db")
    assert visible("  two\n\n lines\t ") == "  two\n\n lines\t "


@pytest.mark.parametrize("text", ["x" * 100_000, "\u202e" * 100_000, "\x00\x01" * 5_000, "\ud800", ""])
def test_strange_texts_can_be_judged(store, text):
    sets = [a_set("Why?", (text, "other"))]
    person = Person(app_of(store, "pair", sets), "Ada")
    assert person.answer(value="first").status_code == 200
    assert store.sets()[sets[0].id].outputs[0].text == text and len(store.judgements()) == 1


# -- work -------------------------------------------------------------------------------------------------------------


def test_ratings_are_written_as_they_were_given(store):
    person = Person(app_of(store), "Ada")
    time.sleep(0.05)
    person.answer(value="4", comment=" good <b> ", seconds="0.02")
    (j,) = store.judgements()
    assert (j.kind, j.value, j.scale, j.comment, j.annotator, j.page) == (
        "rating",
        4,
        "1-5",
        "good <b>",
        "Ada",
        "0.1.0",
    )
    assert j.seconds == 0.02 and j.source == "person" and len(j.outputs) == 1


@pytest.mark.parametrize("claimed", ["", "nan", "-4", "1e9", "inf", "x"])
def test_a_claimed_time_is_bounded_by_the_server(store, claimed):
    person = Person(app_of(store), "Ada")
    person.answer(value="4", seconds=claimed)
    assert 0 <= store.judgements()[0].seconds < 30


@pytest.mark.parametrize("question, value", [("rating", "3"), ("pair", "tie"), ("ranking", None)])
def test_a_whole_session(store, question, value):
    person = Person(app_of(store, question), "Ada")
    total = {"rating": 9, "pair": 9, "ranking": 3}[question]
    for k in range(total):
        html = person.html()
        assert f"{k + 1} of {total}" in html and "model" not in html.split("<dialog")[0]
        ids = re.findall(r'data-output="(\w+)"', html)
        person.answer(value=value or json.dumps([ids[:1], ids[1:]]))
    assert "All 9 items" in person.html() or "All 3 items" in person.html()
    judged = store.judgements()
    assert len(judged) == total == len({(j.set_id, frozenset(j.outputs)) for j in judged})
    assert all(j.kind == question for j in judged)


def test_the_order_shown_is_kept_and_differs_between_people():
    many = [a_set(f"q{k}", ("a", "b", "c", "d")) for k in range(20)]
    items = items_of(many, "ranking")
    desks = [Desk(name, items, [], "ranking", "1-5") for name in ("Ada", "Bob")]
    assert list(desks[0].items) != list(desks[1].items)
    orders = [[item.order_for(name) for item in items] for name in ("Ada", "Ada", "Bob")]
    assert orders[0] == orders[1] != orders[2]
    first = [item.outputs.index(order[0]) for item, order in zip(items, orders[0], strict=True)]
    assert len(set(first)) == 4  # every place comes first now and then


@pytest.mark.parametrize("count, pairs", [(1, 0), (2, 1), (3, 3), (4, 6), (5, 6), (9, 9)])
def test_few_pairs_of_a_set_and_no_output_left_out(count, pairs):
    items = items_of([a_set("q", [f"text {k}" for k in range(count)])], "pair")
    assert len({item.key for item in items}) == pairs == len(items)
    assert count == 1 or len({name for item in items for name in item.outputs}) == count


def test_work_goes_on_where_it_stopped(store, tmp_path):
    person = Person(app_of(store), "Ada")
    for value in "345":
        person.answer(value=value)
    at = person.field("id", 'id="answer"')
    assert person.field("id", 'id="answer"') == at  # a reload is the same item, and the same answer
    with Store(store.path) as again:  # another server on the same file
        back = Person(app_of(again), "Ada")
        assert "4 of 9" in back.html()
        other = Person(back.app, "Bob")
        assert "1 of 9" in other.html()
        other.answer(value="1")
        assert "4 of 9" in back.html() and "2 of 9" in other.html()


def test_two_people_at_once_do_not_mix(store):
    app = app_of(store, "pair")
    people = [Person(app, name) for name in ("Ada", "Bob")]
    for k in range(9):
        for person in people if k % 2 else people[::-1]:
            person.answer(value="first")
    assert {j.annotator for j in store.judgements()} == {"Ada", "Bob"} and len(store.judgements()) == 18
    assert all("items are answered" in person.html() for person in people)


def test_switching_the_annotator(store):
    person = Person(app_of(store), "Ada")
    person.answer(value="3")
    assert "Who is judging?" in person.post("/leave").text
    person.post("/name", name="Bob")
    person.answer(value="3")
    assert [j.annotator for j in store.judgements()] == ["Ada", "Bob"]


def test_a_double_click_counts_once(store):
    person = Person(app_of(store), "Ada")
    sent = {"id": person.field("id", 'id="answer"')}
    for value in ("3", "3", "5"):
        assert person.post("/answer", **sent, value=value).status_code == 200
    assert [j.value for j in store.judgements()] == [3] and "2 of 9" in person.html()


def test_undo_goes_back_step_by_step(store):
    person = Person(app_of(store), "Ada")
    places = []
    for value in "123":
        html = person.html()
        places.append(re.search(r'class="output".*?class="text"[^>]*>([^<]*)', html, re.S)[1])
        person.answer(value=value)
    for k, place in ((2, places[2]), (1, places[1])):
        html = person.undo().text
        assert place in html and f"{k + 1} of 9" in html
    person.answer(value="5")
    assert places[2] in person.html()  # that was undone too, and is asked again
    kinds = [(j.kind, j.value if j.kind == "rating" else "") for j in store.judgements()]
    assert kinds == [("rating", 1), ("rating", 2), ("rating", 3), ("undo", ""), ("undo", ""), ("rating", 5)]


def test_an_undo_clicked_twice_undoes_once(store):
    person = Person(app_of(store), "Ada")
    for value in "123":
        person.answer(value=value)
    last = person.field("id", 'action="/undo"')
    for _ in range(2):
        person.post("/undo", id=last)
    assert "3 of 9" in person.html() and sum(j.kind == "undo" for j in store.judgements()) == 1


def test_undo_reaches_behind_a_restart_and_the_end(store):
    person = Person(app_of(store, "ranking"), "Ada")
    for _ in range(3):
        person.answer(kind="skip")
    with Store(store.path) as again:
        back = Person(app_of(again, "ranking"), "Ada")
        assert "All 3 items" in back.html() and "3 of 3" in back.undo().text
    assert Person(app_of(store, "pair"), "Ada").field("id", 'action="/undo"') is None  # another question's answer


def test_skips_and_flags_are_kept_as_what_they_are(store):
    person = Person(app_of(store, "pair"), "Ada")
    person.answer(kind="skip", comment="hm")
    refused = person.answer(kind="flag", reason=" ")
    assert refused.status_code == 422 and "what is wrong" in refused.text
    person.answer(kind="flag", reason="not English")
    person.answer(value="both_bad")
    said = [(j.kind, j.value, j.comment, j.question, len(j.outputs)) for j in store.judgements()]
    assert said == [
        ("skip", None, "hm", "pair", 2),
        ("flag", None, "not English", "pair", 2),
        ("pair", "both_bad", "", "pair", 2),
    ]


@pytest.mark.parametrize("scale, good, wrong", [("1-5", "5", "6"), ("1-10", "10", "0"), ("binary", "0", "2")])
def test_a_rating_off_the_scale_is_refused(store, scale, good, wrong):
    person = Person(app_of(store, scale=scale), "Ada")
    for value in (wrong, "-1", "3.5", "nan", "", "1" * 5000, "true", "\u0663", "\uff13"):
        answer = person.answer(value=value)
        assert answer.status_code == 422 and store.judgements() == []
    assert person.answer(value=good).status_code == 200
    assert store.judgements()[0].value == int(good)


def test_a_ranking_that_misses_an_item_is_refused(store):
    person = Person(app_of(store, "ranking"), "Ada")
    a, b, c = re.findall(r'data-output="(\w+)"', person.html())
    wrong = [[[a], [b]], [[a], [b], [c], [a]], [[a, b, c, "x"]], [[], [a, b, c]], [a, b, c], {}, None, "a", [[1]], 3]
    for value in [*map(json.dumps, wrong), "", "[" * 20_000, "{"]:
        assert person.answer(value=value).status_code == 422
    assert store.judgements() == []
    person.answer(value=json.dumps([[c, a], [b]]))
    assert store.judgements()[0].value == [[c, a], [b]] and store.judgements()[0].outputs == (a, b, c)


def test_answers_to_nothing_known_are_refused(store):
    person = Person(app_of(store, "pair"), "Ada")
    for asked in ("", "unknown", "../x"):
        assert person.post("/answer", id=asked, value="first").status_code == 409
    bob = Person(person.app, "Bob")
    theirs = bob.field("id", 'id="answer"')
    assert person.post("/answer", id=theirs, value="first").status_code == 409
    for fields in ({"kind": "undo"}, {"kind": "rating", "value": "3"}, {"value": "0.7"}, {"value": "<b>"}, {}):
        assert person.answer(**fields).status_code == 422
    assert store.judgements() == []


def test_nothing_to_compare_is_said_at_the_start(store):
    with pytest.raises(FeedbackError, match="--n 2"):
        app_of(store, "pair", [a_set(texts=("alone",))])
    with pytest.raises(FeedbackError, match="scale"):
        app_of(store, scale="1-6")
    with pytest.raises(FeedbackError, match="question"):
        app_of(store, "best")


def test_judgements_by_others_and_on_other_scales_leave_an_item_open(store):
    store.add_sets(SETS)
    one = SETS[0]
    said = {"set_id": one.id, "kind": "rating", "outputs": (one.outputs[0].id,), "value": 1, "question": "rating"}
    store.add([Judgement(**said, annotator="Ada", scale="1-10"), Judgement(**said, annotator="Bob", scale="1-5")])
    store.add([Judgement(**said, annotator="Ada", scale="1-5", source="scorer")])
    assert "1 of 9" in Person(app_of(store), "Ada").html()
    assert "2 of 9" in Person(app_of(store), "Bob").html()


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_answer_that_cannot_be_written_can_be_sent_again(store):
    person = Person(app_of(store), "Ada")
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    refused = person.answer(value="4", comment="kept <this>")
    assert refused.status_code == 503 and "Nothing was lost" in refused.text and "locked" in refused.text
    kept = {name: unescape(v) for name, v in re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', refused.text)}
    assert kept["comment"] == "kept <this>" and store.judgements() == []
    other.execute("ROLLBACK")
    other.close()
    assert person.post("/answer", **kept).status_code == 200
    assert [(j.value, j.comment, j.id) for j in store.judgements()] == [(4, "kept <this>", kept["id"])]


def test_a_full_disk_is_said_and_loses_nothing(store):
    person = Person(app_of(store), "Ada")
    person.answer(value="2")
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    refused = person.answer(value="4", comment="long " * 5000)
    assert refused.status_code == 503 and "disk is full" in refused.text and len(store.judgements()) == 1
    store._db.execute("PRAGMA max_page_count = 100000")
    person.answer(value="4", comment="long " * 5000)
    assert len(store.judgements()) == 2


def test_a_sets_file_that_changed_is_said(store, tmp_path):
    path = tmp_path / "sets.jsonl"
    write_sets(path, SETS)
    before = path.read_bytes()
    person = Person(app_of(store, sets_path=path), "Ada")
    assert "sets file changed" not in person.html()
    write_sets(path, SETS[:1])
    assert "sets file changed" in person.html() and "stay valid" in person.html()
    person.answer(value="3")
    assert len(store.judgements()) == 1
    path.write_bytes(before)
    assert "sets file changed" not in person.html()
    path.unlink()
    assert "sets file changed" in person.html()


# -- a real server ----------------------------------------------------------------------------------------------------


def _serve(path, sets, links, question="rating", limits=None, files=None):
    with (path.parent / "stderr").open("w") as said:
        os.dup2(said.fileno(), 2)
    for name, value in (limits or {}).items():
        setattr(connections, name, value)
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    serve(sets, path, question=question, on_ready=links.put)


class Server:
    """`serve` in a process of its own, forked from one that has imported everything."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, path, sets=SETS, question="rating", **more):
        self.context.set_forkserver_preload(["lossmith.feedback.page"])
        self.links, self.path = self.context.Queue(), path
        args = (path, sets, self.links, question, more.get("limits"), more.get("files"))
        self.process = self.context.Process(target=_serve, args=args, daemon=True)
        self.process.start()
        self.link = self.links.get(timeout=60)
        self.address = "127.0.0.1", urlsplit(self.link).port

    def stop(self, how=signal.SIGINT):
        os.kill(self.process.pid, how)
        self.process.join(10)
        self.links.close()
        self.links.join_thread()
        return self.process.exitcode

    def said(self):
        """What stood on its terminal besides the links."""
        return (self.path.parent / "stderr").read_text()

    def connect(self, sent=b""):
        client = socket.create_connection(self.address, timeout=20)
        client.sendall(sent)
        return client


def test_ctrl_c_stops_it_cleanly(tmp_path):
    server = Server(tmp_path / "j.db")
    with httpx.Client(follow_redirects=True) as client:
        assert "Who is judging?" in client.get(server.link).text
        assert client.get(server.link).status_code == 200  # in already
    with httpx.Client() as client:
        assert client.get(server.link).status_code == 403
        assert client.get(server.links.get(timeout=10)).status_code == 303  # the next link, as printed
    with pytest.raises(FeedbackError, match="already running"):
        serve(SETS, tmp_path / "j.db", question="rating")
    with pytest.raises(FeedbackError, match="port"):
        serve(SETS, tmp_path / "other.db", question="rating", port=urlsplit(server.link).port)
    assert server.stop() == 0


HEAD = b"POST /answer HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\n"
STALLED = {
    "nothing": b"",
    "half a line": b"GET / HT",
    "half a head": HEAD,
    "half a body": HEAD + b"Content-Length: 100\r\n\r\nid=1",
    "half a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n100\r\nid=1",
}


def gone(client):
    """Whether the server has closed the connection."""
    try:
        while client.recv(65536):
            pass
    except ConnectionResetError:
        pass
    client.close()
    return True


def test_stalled_clients_are_dropped_and_nothing_is_printed(tmp_path):
    server = Server(tmp_path / "j.db", limits={"READ": 0.5})
    clients = [server.connect(sent) for sent in STALLED.values()]
    slow = server.connect(b"GET / HT")
    began = time.monotonic()
    with contextlib.suppress(OSError):
        while time.monotonic() - began < 30:  # a byte now and then buys no time
            time.sleep(0.1)
            slow.sendall(b"T")
    assert 0.4 < time.monotonic() - began < 20
    slow.close()
    assert all(map(gone, clients))
    assert httpx.get(server.link).status_code == 303
    assert server.stop() == 0 and server.said() == ""


def test_vanishing_clients_and_garbage_print_nothing(tmp_path):
    server = Server(tmp_path / "j.db")
    chunk = b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    whole = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    for sent in (*STALLED.values(), whole, b"\0\xff\r\n\r\n", whole + b"\0\xff\r\n\r\n", HEAD + b"\xff: 1\r\n\r\n",
                 HEAD + chunk, HEAD.replace(b"/answer", b"/no") + chunk, HEAD.replace(b"Host: ", b"Host: x") + chunk,
                 HEAD + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n", b"G" * 200_000):  # fmt: skip
        for reset in (False, True):
            client = server.connect()
            with contextlib.suppress(ConnectionError):
                client.sendall(sent)
                time.sleep(0.01)
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
    assert httpx.get(server.link).status_code == 303
    assert server.stop() == 0 and server.said() == ""


def test_an_endless_body_is_cut_and_the_client_is_told(tmp_path):
    server = Server(tmp_path / "j.db")
    client = server.connect(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    sent, chunk = 0, b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with contextlib.suppress(ConnectionError):
        while sent < 500_000_000:
            client.sendall(chunk)
            sent += len(chunk)
    assert sent < 50_000_000  # what the two ends' buffers hold
    client.close()
    polite = server.connect(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + chunk)
    assert polite.recv(65536).startswith(b"HTTP/1.1 413 ")
    assert gone(polite)
    assert server.stop() == 0 and server.said() == ""


@pytest.mark.parametrize("given", [{"limits": {"MOST": 40}}, {"files": 300}], ids=["places", "open files"])
def test_more_stalled_clients_than_places_leave_room_for_those_who_work(tmp_path, given):
    server = Server(tmp_path / "j.db", **given)
    clients = [server.connect(sent) for sent in (*STALLED.values(),) * 70]
    with httpx.Client(timeout=30) as working:
        assert working.get(server.link).status_code == 303
        for _ in range(3):
            clients += [server.connect(b"GET") for _ in range(50)]
            assert "Who is judging?" in working.get(server.link.split("?")[0]).text
    assert gone(clients[0])
    assert server.stop() == 0 and server.said() == ""
    for client in clients:
        client.close()


def clicking(link, seed, acknowledged, until):
    """Rates until the server is gone; `acknowledged` gets each id whose answer came back."""
    try:
        with httpx.Client(follow_redirects=False, timeout=60) as client:
            base = link.split("?")[0]
            client.get(link)
            html = client.get(base).text
            csrf = re.search(r'name="csrf" value="([^"]*)"', html)[1]
            client.post(base + "name", data={"csrf": csrf, "name": f"person {seed}"})
            while time.monotonic() < until:
                html = client.get(base).text
                asked = re.search(r'id="answer".*?name="id" value="(\w+)"', html, re.S)[1]
                value = random.Random(asked).randint(1, 5)
                done = client.post(base + "answer", data={"csrf": csrf, "id": asked, "value": str(value)})
                if done.status_code == 303:
                    acknowledged[asked] = value
    except httpx.HTTPError:
        pass


def test_kill_9_at_twenty_moments_loses_no_acknowledged_answer(tmp_path):
    path, acknowledged, moments = tmp_path / "j.db", {}, random.Random(20)
    sets = [a_set(f"q{k}", [f"{k} {n}" for n in range(8)]) for k in range(60)]
    for k in range(20):
        server, enough = Server(path, sets), len(acknowledged) + moments.randint(1, 12)
        clicks = threading.Thread(target=clicking, args=(server.link, k, acknowledged, time.monotonic() + 120))
        clicks.start()
        while len(acknowledged) < enough and clicks.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        clicks.join(20)
        with Store(path) as store:
            written = {j.id: j.value for j in store.judgements()}
            assert acknowledged.items() <= written.items()
            assert len(written) <= len(acknowledged) + k + 1  # and at most the click in flight besides
    assert len(acknowledged) > 100


@pytest.mark.slow
def test_twenty_annotators_beside_a_thousand_stalled_connections(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "annotation.py"
    subprocess.run([sys.executable, script, "--out", tmp_path / "found.json"], check=True, timeout=300)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["acknowledged"] == found["stored"] == 800 and found["lost_or_wrong"] == 0
    assert found["stalled_held"] > 900 and found["lines_on_the_terminal"] == 0  # how fast is the benchmark's to say

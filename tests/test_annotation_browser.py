"""The annotation page in a real browser: a tired person's hour, in small.

LOSSMITH_SCREENSHOTS=DIR saves a picture of each page there: pytest -m browser -k pictures.
"""

import os
import re
import shutil
import sqlite3
from pathlib import Path

import pytest

from lossmith.feedback.output_set import OutputSet, named
from lossmith.feedback.store import Store
from lossmith.prompts import Prompt
from test_annotation_page import Server, a_set

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

SETS = [a_set(f"Question {k}?", [f"Answer {name} to {k}" for name in ("one", "two", "three")]) for k in range(2)]


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(tmp_path):
    """A server on a new file; called again, another question on the same file."""
    running = []

    def start(question="rating", sets=SETS):
        if running:
            running.pop().stop()
        running.append(Server(tmp_path / "j.db", sets, question))
        return running[0]

    yield start
    for server in running:
        server.stop()


def come_in(chromium, link, name, **how):
    """A browser that has never been here opens the link and says its name."""
    page = chromium.new_context(**how).new_page()
    page.set_default_timeout(30_000)
    page.wrong = []
    page.on("dialog", lambda dialog: (page.wrong.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.goto(link)
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Enter")
    ready(page)
    return page


def ready(page):
    page.wait_for_selector("#page[data-ready]")


def item(page):
    return page.locator("#answer input[name=id]").get_attribute("value")


def doing(page, act):
    """Does something that brings the next page, and waits for it."""
    before = page.locator("#page").element_handle()
    act()
    page.wait_for_function("old => !old.isConnected", arg=before)
    ready(page)


def key(page, name):
    doing(page, lambda: page.keyboard.press(name))


def progress(page):
    return page.locator(".progress span").inner_text()


def judged(server_path):
    with Store(server_path) as store:
        return store.judgements()


def test_a_whole_session(chromium, served, tmp_path):
    """Rates, compares, ranks by mouse and by keyboard, undoes, closes, resumes as the same and as another."""
    path = tmp_path / "j.db"
    rates_and_comes_back(chromium, served("rating"), path)
    compares(chromium, served("pair"), path)
    ranks(chromium, served("ranking"), path)


def rates_and_comes_back(chromium, server, path):
    page = come_in(chromium, server.link, "Ada")
    assert progress(page) == "1 of 6" and "token" not in page.url
    doing(page, page.get_by_role("button", name="4", exact=True).click)
    key(page, "2")
    assert [j.value for j in judged(path)] == [4, 2]
    text = page.locator(".output .text").inner_text()
    key(page, "5")
    key(page, "u")
    assert page.locator(".output .text").inner_text() == text and progress(page) == "3 of 6"
    key(page, "Control+z")
    assert progress(page) == "2 of 6"
    page.context.close()

    other = come_in(chromium, server.links.get(timeout=10), "Bob")
    assert progress(other) == "1 of 6"
    key(other, "1")
    other.context.close()
    page = chromium.new_context().new_page()
    page.goto(server.links.get(timeout=10))
    page.get_by_role("button", name="Ada").click()
    ready(page)
    assert progress(page) == "2 of 6"
    for value in "12345":
        key(page, value)
    assert page.get_by_role("heading").inner_text() == "That was the last one. Thank you."
    page.context.close()


def compares(chromium, server, path):
    page = come_in(chromium, server.link, "Ada")
    for name in ("ArrowLeft", "2", "t", "b", "s"):
        key(page, name)
    page.keyboard.press("f")
    page.keyboard.type("both are cut off")
    key(page, "Control+Enter")
    assert "last one" in page.inner_text("main") and page.locator(".summary").inner_text().split()[:2] == [
        "Compared",
        "4",
    ]
    page.context.close()
    said = [(j.value or j.comment) for j in judged(path) if j.question == "pair"]
    assert said == ["first", "second", "tie", "both_bad", "", "both are cut off"]


def ranks(chromium, server, path):
    page = come_in(chromium, server.link, "Ada")
    shown = [card.get_attribute("data-output") for card in page.locator(".card").all()]
    drag(page, 2, 0, 0.1)  # the last one to the top
    assert tiers(page) == [[shown[2]], [shown[0]], [shown[1]]]
    drag(page, 2, 1, 0.5)  # onto another: a tie
    assert tiers(page) == [[shown[2]], [shown[0], shown[1]]] and "2 places" in page.inner_text("#count")
    doing(page, page.get_by_role("button", name="Send this ranking").click)
    assert judged(path)[-1].value == [[shown[2]], [shown[0], shown[1]]] and judged(path)[-1].outputs == tuple(shown)

    shown = [card.get_attribute("data-output") for card in page.locator(".card").all()]
    page.locator(".card").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("=")
    assert tiers(page) == [[shown[1]], [shown[2], shown[0]]]
    page.keyboard.press("=")
    page.keyboard.press("ArrowUp")
    assert tiers(page) == [[shown[1]], [shown[0]], [shown[2]]]
    key(page, "Enter")
    assert judged(path)[-1].value == [[shown[1]], [shown[0]], [shown[2]]]
    assert page.locator(".summary").is_visible() and page.locator("body").inner_text().count("Ada")
    page.context.close()


def tiers(page):
    return page.evaluate(
        "[...document.querySelectorAll('.tier')].map(t => [...t.querySelectorAll('.card')].map(c => c.dataset.output))"
    )


def drag(page, which, onto, at):
    """A card by its grip, dropped at a fraction of another's height."""
    page.locator(".card").nth(onto).scroll_into_view_if_needed()
    grip = page.locator(".card").nth(which).locator(".letter").bounding_box()
    box = page.locator(".card").nth(onto).bounding_box()
    page.mouse.move(grip["x"] + 5, grip["y"] + 5)
    page.mouse.down()
    page.mouse.move(grip["x"] + 20, grip["y"] - 10, steps=3)
    page.mouse.move(box["x"] + 60, box["y"] + box["height"] * at, steps=5)
    page.mouse.up()


def test_keyboard_alone(chromium, served, tmp_path):
    """From the name to the end without a mouse; comment, help, and keys typed into a comment are no answers."""
    page = come_in(chromium, served("pair").link, "Ada")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("1")  # not meant for what lies beneath
    page.keyboard.press("Escape")
    assert page.locator("#help").is_hidden() and judged(tmp_path / "j.db") == []
    page.keyboard.press("c")
    page.keyboard.type("1 is better, but not by much")
    page.keyboard.press("Escape")
    key(page, "1")
    (j,) = judged(tmp_path / "j.db")
    assert (j.value, j.comment) == ("first", "1 is better, but not by much") and 0 < j.seconds < 30
    for _ in range(40):  # every control is reached by Tab, and Enter presses it
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.value") == "tie":
            break
    key(page, "Enter")
    assert judged(tmp_path / "j.db")[-1].value == "tie" and page.wrong == []
    page.context.close()


def test_a_double_click_answers_one_item(chromium, served, tmp_path):
    page = come_in(chromium, served("rating").link, "Ada")
    doing(page, page.get_by_role("button", name="3", exact=True).dblclick)
    page.keyboard.press("Control+Shift+4")  # a browser's shortcut is no answer
    assert len(judged(tmp_path / "j.db")) == 1 and progress(page) == "2 of 6"
    page.context.close()


def test_an_untouched_ranking_is_asked_twice(chromium, served, tmp_path):
    page = come_in(chromium, served("ranking").link, "Ada")
    page.keyboard.press("Enter")
    assert "by chance" in page.inner_text("#toast") and judged(tmp_path / "j.db") == []
    key(page, "Enter")
    assert len(judged(tmp_path / "j.db")) == 1
    before = tiers(page)
    page.locator(".card").nth(1).get_by_role("button", name="Move up").click()  # neither dragged nor by key
    key(page, "Enter")
    assert judged(tmp_path / "j.db")[-1].value == [before[1], before[0], before[2]]
    page.context.close()


def test_hostile_completions_do_nothing(chromium, served, tmp_path):
    bad = [
        "<script>window.hit=1;alert(1)</script>",
        "<img src=x onerror='window.hit=1;alert(1)'>",
        "</textarea></form>a",
    ]
    bad += ["\u202egnp.exe\x1b[31m\x00", "x" * 100_000]
    page = come_in(chromium, served("ranking", [a_set(bad[0], bad)]).link, "<img src=x onerror=alert(2)>")
    texts = page.locator(".output .text").all_inner_texts()
    assert set(bad[:3]) < set(texts) and any("U+202E" in t and "U+001B" in t and "U+0000" in t for t in texts)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator(".card").first.focus()
    page.keyboard.press("=")
    page.keyboard.press("ArrowDown")
    key(page, "Enter")
    key(page, "u")  # drawn by the script this time
    assert page.locator(".card").count() == 5
    assert page.evaluate("window.hit") is None and page.wrong == [] and page.locator("img").count() == 0
    page.context.close()


def test_an_answer_that_cannot_be_saved_stays(chromium, served, tmp_path):
    server = served("rating")
    page = come_in(chromium, server.link, "Ada")
    other = sqlite3.connect(tmp_path / "j.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    page.keyboard.press("c")
    page.keyboard.type("kept")
    page.keyboard.press("Escape")
    page.keyboard.press("4")
    page.get_by_text("Nothing was lost").wait_for(timeout=20_000)
    other.execute("ROLLBACK")
    other.close()
    doing(page, page.get_by_role("button", name="Send again").click)
    assert [(j.value, j.comment) for j in judged(tmp_path / "j.db")] == [(4, "kept")]
    page.context.set_offline(True)
    page.keyboard.press("5")
    page.get_by_text("cannot be reached").wait_for()
    page.context.set_offline(False)
    doing(page, page.get_by_role("button", name="Send again").click)
    assert len(judged(tmp_path / "j.db")) == 2
    page.context.close()


def test_without_scripts(chromium, served, tmp_path):
    page = chromium.new_context(java_script_enabled=False).new_page()
    page.goto(served("pair").link)
    page.get_by_label("Your name").fill("Ada")
    page.get_by_role("button", name="Start").click()
    page.get_by_role("button", name="First is better").click()
    page.get_by_role("button", name="Skip").click()
    page.get_by_role("button", name="Undo").click()
    assert progress(page) == "2 of 6"
    assert [j.kind for j in judged(tmp_path / "j.db")] == ["pair", "skip", "undo"]
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_the_light_and_in_the_dark(chromium, served, scheme):
    """Contrast of text and ground by WCAG's formula, at least 4.5 to 1 wherever there is text."""
    page = come_in(chromium, served("pair").link, "Ada", color_scheme=scheme)
    grounds = page.evaluate(
        """() => [...document.querySelectorAll("#page *")].filter(e => e.offsetParent && [...e.childNodes].some(
             n => n.nodeType === 3 && n.data.trim())).map(e => { let g = e; const see = x => getComputedStyle(x);
             while (g !== document.body && see(g).backgroundColor === "rgba(0, 0, 0, 0)") g = g.parentElement;
             return [e.className + e.innerText.slice(0, 20), see(e).color, see(g).backgroundColor]; })"""
    )
    assert len(grounds) > 10
    for what, ink, ground in grounds:
        light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, what
    body = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert body < 0.05 if scheme == "dark" else body > 0.8
    page.context.close()


def luminance(color):
    parts = [int(x) / 255 for x in re.findall(r"\d+", color)[:3]]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("question", ["rating", "pair", "ranking"])
def test_it_fits_a_phone(chromium, served, question):
    page = come_in(
        chromium, served(question).link, "Ada", viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for box in [b.bounding_box() for b in page.locator(".choices button:visible").all()]:
        assert box["height"] >= 44 and box["width"] >= 44
        assert box["y"] + box["height"] <= 640  # in sight without scrolling
    page.context.close()


# -- pictures ---------------------------------------------------------------------------------------------------------

WATER = "Explain the water cycle to a ten-year-old, in two or three sentences."
CYCLE = (
    "The sun warms water in seas and lakes, and some of it rises into the air as a gas you cannot see. Up high it "
    "cools, turns into tiny drops and makes clouds. When the drops grow heavy they fall as rain or snow, run back "
    "to the sea, and the journey starts again.",
    "Water evaporates, condenses and precipitates. This is called the hydrological cycle.",
    "Clouds are made of cotton that soaks up the sea.\n\nWhen they are full, it rains!",
    "Rain falls, plants drink it, and rivers carry what is left to the sea, where the sun lifts it up again as vapour.",
)


def pictured(question):
    prompt = Prompt(WATER, {}, "")
    made = {"model": "m"}
    count = {"pair": 2, "ranking": 4, "rating": 1}[question]
    sets = [OutputSet(prompt, tuple(named(prompt, t, made=made) for t in CYCLE[:count]), made)]
    return sets + [a_set(f"Why {k}?", ("a", "b")) for k in range(11)]


LOOKS = {
    "light": {"viewport": {"width": 1100, "height": 720}},
    "dark": {"viewport": {"width": 1100, "height": 720}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 780}, "is_mobile": True, "has_touch": True},
}
PICTURES = [("rating", "light"), ("pair", "dark"), ("ranking", "light"), ("pair", "phone")]


@pytest.mark.skipif("LOSSMITH_SCREENSHOTS" not in os.environ, reason="LOSSMITH_SCREENSHOTS names no folder")
def test_pictures(chromium, served):
    folder = Path(os.environ["LOSSMITH_SCREENSHOTS"])
    folder.mkdir(parents=True, exist_ok=True)
    for question, look in PICTURES:
        server = served(question, pictured(question))
        page = come_in(chromium, server.link, "Ada", **LOOKS[look])
        while page.locator(".prompt").inner_text().find("water cycle") < 0:
            key(page, "s")
        if question == "ranking":
            page.locator(".card").nth(1).focus()
            page.keyboard.press("=")
        page.screenshot(path=folder / f"{question}-{look}.png")
        if (question, look) == PICTURES[0]:
            while page.locator("#answer").count():
                key(page, "4")
            page.screenshot(path=folder / "done-light.png")
            other = chromium.new_context(**LOOKS["light"]).new_page()
            other.goto(server.links.get(timeout=10))
            other.screenshot(path=folder / "name-light.png")
            other.context.close()
        page.context.close()

"""The explorer in a real browser: every slider and field, the keyboard alone, phone and dark.

LOSSMITH_AXE=axe.min.js (npm pack axe-core) has its accessibility checked; LOSSMITH_SCREENSHOTS=DIR saves pictures.
"""

import os
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import uvicorn

from lossmith.explorer import State, export_view, view
from lossmith.explorer.server import make_app
from lossmith.explorer.state import SCREENS
from test_annotation_browser import CHROMIUM, LOOKS, chromium  # noqa: F401

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]


@pytest.fixture(scope="module")
def link():
    server = uvicorn.Server(uvicorn.Config(make_app(), port=0, log_level="error", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture
def opened(chromium, link):  # noqa: F811
    contexts = []

    def start(query="", where=None, **looks):
        contexts.append(chromium.new_context(**looks))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.wrong, page.asked = [], []
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("console", lambda message: page.wrong.append(message.text))
        page.on("dialog", lambda dialog: (page.wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(where or f"{link}?{query}")
        return page

    yield start
    for context in contexts:
        context.close()


def settled(page):
    """Nothing is being asked, and all steps are there."""
    quiet = (
        "document.body.dataset.state === 'settled' && !asking && !waiting && (!view.view || view.view.done !== false)"
    )
    for _ in range(1200):  # its policy lets no string become code, which wait_for_function needs
        if page.evaluate(quiet):
            return
        page.wait_for_timeout(50)
    raise AssertionError("the page is still asking after a minute")


def calls(page):
    settled(page)
    return parse_qs(urlsplit(page.url).query)["loss"]


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_each_screen_fits_and_asks_nobody_else(opened, link, screen, look):
    page = opened(f"loss=grpo&loss=gspo&loss=dpo&loss=book_clip&steps=3&screen={screen}", **LOOKS[look])
    settled(page)
    assert page.locator("h1").inner_text() == SCREENS[screen]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.wrong == [] and all(url.startswith(link) for url in page.asked)
    assert page.locator("#view > *").count() >= 2


def test_every_slider_and_field_of_a_loss_does_what_it_says(opened):
    page = opened("loss=grpo&screen=weight")
    settled(page)
    for details in page.locator("#chosen summary").all():
        details.click()
    controls = view(State(losses=("grpo",)))["losses"][0]["controls"]
    moved = 0
    for control in controls:
        name = control["name"]
        assert page.locator(f"#l0-{name}").count() == 1, name
        if control["kind"] == "number":
            before = calls(page)[0]
            slider = page.locator(f"#l0-{name}-slider")
            at_the_end = slider.input_value() == slider.get_attribute("max")
            slider.press("ArrowLeft" if at_the_end else "ArrowRight")
            changed = calls(page)[0] != before
            assert changed or page.locator("#refusal").is_visible(), name
            moved += changed
    assert moved >= 8 and [text for text in page.wrong if "422" not in text] == []


def test_a_slider_moves_the_curve_and_the_address(opened):
    page = opened("loss=grpo(beta=0.0)&screen=weight")
    settled(page)
    before = page.locator("polyline").first.get_attribute("points")
    page.locator("#l0-clip_high").fill("0.5")
    page.keyboard.press("Enter")
    assert calls(page) == ["grpo(clip_high=0.5, beta=0.0)"]
    assert page.locator("polyline").first.get_attribute("points") != before
    page.locator("#l0-clip_high").fill("-1")
    page.keyboard.press("Enter")
    page.locator("#refusal").wait_for()
    assert "must be at least 0" in page.locator("#refusal").inner_text()
    assert page.locator("#l0-clip_high").get_attribute("aria-invalid") == "true"
    assert calls(page) == ["grpo(clip_high=0.5, beta=0.0)"]
    page.locator("#l0-clip_high").fill("inf")
    page.keyboard.press("Enter")
    assert calls(page) == ["grpo(clip_high=1e999, beta=0.0)"] and page.locator("#refusal").is_hidden()
    wrong = [text for text in page.wrong if "422" not in text]  # Chromium's own word for an answer that refuses
    assert wrong == []


def test_the_curve_is_read_under_the_pointer_and_by_keyboard(opened):
    page = opened("loss=grpo&screen=weight")
    settled(page)
    chart = page.locator(".chart svg").first
    chart.hover(position={"x": 100, "y": 60})
    text = page.locator(".read").first.inner_text()
    assert text.startswith("r = 0.") and "grpo 0." in text
    chart.focus()
    page.keyboard.press("End")
    assert page.locator(".read").first.inner_text().split() == ["r", "=", "10", "grpo", "0"]
    page.keyboard.press("ArrowLeft")
    assert "r = 9.9" in page.locator(".read").first.inner_text()


def test_by_keyboard_alone_a_loss_is_found_added_and_seen(opened):
    page = opened()
    settled(page)
    page.keyboard.press("Tab")
    for _ in range(30):
        if page.evaluate("document.activeElement.id") == "find":
            break
        page.keyboard.press("Tab")
    page.keyboard.type("gspo")
    page.locator("#found button").first.wait_for()
    page.keyboard.press("Enter")
    assert calls(page) == ["grpo", "dapo", "gspo"]
    page.keyboard.type("rloo(beta=0.1)")
    page.keyboard.press("Enter")
    assert calls(page)[-1] == "rloo(beta=0.1)"
    page.keyboard.type("ppo")
    page.keyboard.press("Enter")
    page.locator("#refusal").wait_for()
    assert "4 losses" in page.locator("#refusal").inner_text()
    page.locator("nav a[data-screen=truth]").focus()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="The truth", level=1).wait_for()
    settled(page)
    assert page.locator("polyline").count() >= 16
    page.go_back()
    page.get_by_role("heading", name="The loss", level=1).wait_for()
    assert page.wrong == []


def test_a_group_is_typed(opened):
    page = opened("loss=grpo(beta=0)&screen=group")
    settled(page)
    page.locator("#n-rewards").fill("1, 1, 1")
    page.keyboard.press("Enter")
    page.get_by_text("All rewards are equal").wait_for()
    assert page.locator("#view tbody tr").count() >= 3 and page.locator("#n-lengths").input_value() == "4, 2, 6"
    page.locator("#n-rewards").fill("1")
    page.keyboard.press("Enter")
    page.locator(".notice", has_text="A group of one").wait_for()
    assert page.wrong == []


@pytest.mark.parametrize("query", ["loss=<img src=x onerror=alert(1)>", "screen=nowhere", "loss=os:system", "steps=no"])
def test_a_hostile_address_gives_words_on_the_page(opened, query):
    page = opened(query)
    page.locator(".notice:visible").first.wait_for()
    text = page.locator(".notice:visible").first.inner_text()
    assert "Traceback" not in text and len(text) > 20 and page.locator("img").count() == 0
    assert [w for w in page.wrong if "422" not in w] == []


def test_the_exported_file_stands_alone(opened, tmp_path):
    file = export_view("loss=grpo&loss=dapo&steps=3", tmp_path / "view.html")
    page = opened(where=file.as_uri())
    for screen, title in SCREENS.items():
        page.locator(f"nav a[data-screen={screen}]").click()
        assert page.locator("h1").inner_text() == title and page.locator("#view > *").count() >= 2
    assert page.wrong == [] and page.asked == [file.as_uri()]


@pytest.mark.skipif("LOSSMITH_AXE" not in os.environ, reason="LOSSMITH_AXE names no axe.min.js")
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_axe_finds_no_fault(opened, screen, look):
    page = opened(f"loss=grpo&loss=book_clip&loss=dpo&steps=3&screen={screen}", bypass_csp=True, **LOOKS[look])
    settled(page)
    page.add_script_tag(path=os.environ["LOSSMITH_AXE"])
    found = page.evaluate("axe.run()")
    faults = [(v["id"], [n["html"][:120] for n in v["nodes"]][:3]) for v in found["violations"]]
    assert faults == [] and len(found["passes"]) > 10


@pytest.mark.skipif("LOSSMITH_SCREENSHOTS" not in os.environ, reason="LOSSMITH_SCREENSHOTS names no folder")
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_pictures(opened, screen, look):
    page = opened(f"loss=grpo&loss=dapo&loss=gspo(clip_low=0.1,clip_high=0.4)&screen={screen}", **LOOKS[look])
    settled(page)
    page.screenshot(
        path=Path(os.environ["LOSSMITH_SCREENSHOTS"]) / f"explorer-{screen}-{look}.png", full_page=look == "phone"
    )

"""The explanation's page in a real browser: what it says when a token is chosen, and that it asks nobody anything.

LOSSMITH_AXE=axe.min.js (npm pack axe-core) has its accessibility checked, that of LOSSMITH_EXPLAINED=PAGE if given;
LOSSMITH_SCREENSHOTS=DIR saves pictures of that page there.
"""

import os
from pathlib import Path

import pytest

from lossmith.explanation import explain
from lossmith.report.explanation.page import explanation_page
from test_annotation_browser import CHROMIUM, LOOKS, chromium  # noqa: F401
from test_replay import jsonl

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>\n\u202eend"


@pytest.fixture
def opened(chromium, tmp_path):  # noqa: F811
    """A page of an explanation, opened with some looks; what went wrong in it is kept."""
    lines = [{"text": HOSTILE, "points": 0.4, "q": "<b>Why?</b>"}, {"text": "b", "points": 0.8, "q": "<b>Why?</b>"}]
    mapping = {"completion": "text", "reward": "points", "group": "q", "prompt": "q"}
    found = explain(jsonl(tmp_path / "r.jsonl", *lines), loss="grpo(beta=0)", sample=0, mapping=mapping)
    file = tmp_path / "page.html"
    file.write_text(explanation_page(found), encoding="utf-8")
    contexts = []

    def start(where=file, **looks):
        contexts.append(chromium.new_context(**looks))
        page = contexts[-1].new_page()
        page.wrong, page.asked = [], []
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("console", lambda message: page.wrong.append(message.text))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(Path(where).as_uri())
        return page

    start.explanation, start.file = found, file
    yield start
    for context in contexts:
        context.close()


def test_a_token_tells_its_chain_by_mouse_and_by_keyboard(opened):
    page = opened()
    assert page.locator("#place").inner_text() == "0"
    page.locator("#t2").click()
    assert page.locator("#place").inner_text() == "2" and page.locator("#t2").get_attribute("aria-pressed") == "true"
    page.keyboard.press("ArrowRight")
    assert page.locator("#place").inner_text() == "3"
    assert page.evaluate("document.activeElement.id") == "t3"
    token = opened.explanation.tokens[3]
    assert page.locator("#sentence").inner_text() == token.sentence
    shown = page.locator("#chain tr.total .n").all_inner_texts()
    assert float(shown[-1].replace("−", "-")) == pytest.approx(token.pull, rel=1e-5)
    assert page.locator(".t[tabindex='0']").count() == 1  # one stop for Tab, arrows go on from there
    assert page.wrong == [] and len(page.asked) == 1  # the file itself


def test_hostile_text_does_nothing_and_nothing_of_it_is_hidden(opened):
    page = opened()
    assert page.evaluate("window.hit") is None and page.locator("img").count() == 0 and page.wrong == []
    assert "U+202E" in page.locator(".tokens").inner_text() and "<b>Why?</b>" in page.locator(".prompt").inner_text()


def test_it_fits_a_phone_and_can_be_read_without_scripts(opened):
    phone = opened(viewport={"width": 360, "height": 640}, is_mobile=True, has_touch=True)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    plain = opened(java_script_enabled=False)
    plain.locator("summary").click()
    assert opened.explanation.tokens[5].sentence in plain.locator("details").inner_text()


@pytest.mark.skipif("LOSSMITH_AXE" not in os.environ, reason="LOSSMITH_AXE names no axe.min.js")
@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_axe_finds_no_fault(opened, look):
    page = opened(os.environ.get("LOSSMITH_EXPLAINED") or opened.file, bypass_csp=True, **LOOKS[look])
    page.add_script_tag(path=os.environ["LOSSMITH_AXE"])
    found = page.evaluate("axe.run()")
    assert [v["id"] for v in found["violations"]] == [] and len(found["passes"]) > 10


@pytest.mark.skipif("LOSSMITH_SCREENSHOTS" not in os.environ, reason="LOSSMITH_SCREENSHOTS names no folder")
@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_pictures(opened, look):
    page = opened(os.environ["LOSSMITH_EXPLAINED"], **LOOKS[look])
    page.screenshot(
        path=Path(os.environ["LOSSMITH_SCREENSHOTS"]) / f"explanation-{look}.png", full_page=look == "phone"
    )

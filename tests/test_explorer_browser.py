"""The explorer in a real browser: every slider and field, keyboard alone, phone, dark, and nothing asked of others.

LOSSMITH_AXE=axe.min.js (npm pack axe-core) has its accessibility checked; LOSSMITH_SCREENSHOTS=DIR saves pictures.
"""

import os
import re
import threading
from pathlib import Path

import pytest
import uvicorn

from lossmith.errors import LossError
from lossmith.explorer import export_view, make_app
from lossmith.explorer.address import PARTS, SCREENS
from lossmith.serving.listening import listen
from test_annotation_browser import CHROMIUM, LOOKS, chromium  # noqa: F401

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]

VIEWS = [f"?screen={s}&loss=grpo&loss=rloo&steps=3&group=2" for s in SCREENS]
VIEWS += [f"?screen=truth&part={p}&loss=rloo&steps=3&group=2" for p in PARTS if p != "steps"]
VIEWS += [f"?tour={n}&loss=grpo&steps=3" for n in range(1, 11)]
QUICK = [f"?screen={s}&loss=grpo&steps=1&group=2" for s in SCREENS] + ["?tour=7&loss=grpo"]
OTHERS = [*QUICK[:-1], *VIEWS]
MOVED = [QUICK[-1], *(pytest.param(view, marks=pytest.mark.slow) for view in OTHERS)]
TYPED = {  # into fields without a slider
    "rewards": "1 0.5 0 | 0.2 0.1", "lengths": "3 2 5 4 4", "proxy": "1 0 0 0 0 0 0", "gold": "0 1 0 0 0 0 0",
    "eps": "0.001", "shaping": "clip", "q": "rloo",
}  # fmt: skip


@pytest.fixture(scope="module")
def address():
    listener = listen("127.0.0.1", 0, LossError)
    server = uvicorn.Server(uvicorn.Config(make_app(), log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)
    listener.close()


@pytest.fixture
def opened(chromium, address):  # noqa: F811
    contexts = []

    def start(view="", where=None, **looks):
        contexts.append(chromium.new_context(**looks))
        page = contexts[-1].new_page()
        watched(page)
        page.goto(where or address + view)
        settled(page)
        return page

    yield start
    for context in contexts:
        context.close()


def watched(page):
    page.set_default_timeout(30_000)
    page.wrong, page.asked = [], []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda message: page.wrong.append(message.text))
    page.on("dialog", lambda dialog: (page.wrong.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: page.asked.append(request.url))


def settled(page):
    page.wait_for_function("() => { const f = document.getElementById('view'); "
                           "return !f.hasAttribute('aria-busy') && !('more' in f.dataset); }")  # fmt: skip


def well(page, address):
    assert page.wrong == [] and all(url.startswith(address) for url in page.asked)
    return True


@pytest.mark.parametrize("view", MOVED)
def test_every_slider_and_field_is_moved(opened, address, view):
    """Each control of a screen in turn: the page stays whole, the address says what was changed."""
    page = opened(view)
    if view == QUICK[0]:
        page.locator(".choices summary").click()  # a loss's controls are the same beside every screen
    names = page.locator("#view [data-for]").evaluate_all("all => all.map(e => e.dataset.for)")
    for name in names:
        slider = page.locator(f'[data-for="{name}"]')
        if not slider.count() or not slider.is_visible():
            continue  # it lies folded, or went with a choice
        before = page.locator(f'[id="f-{name}"]').input_value()
        slider.focus()
        page.keyboard.press("ArrowRight")
        settled(page)
        if page.locator(f'[id="f-{name}"]').input_value() == before:
            page.keyboard.press("ArrowLeft")
            settled(page)
        assert page.locator(f'[id="f-{name}"]').input_value() != before, name
        assert page.evaluate("document.activeElement.dataset.for") == name  # the focus is where it was
    for name in page.locator("#view input[name]:visible").evaluate_all("all => all.map(e => e.name)"):
        field = page.locator(f'[id="f-{name}"]')
        if not field.count() or page.locator(f'[data-for="{name}"]').count():
            continue
        before = page.url
        field.fill(TYPED.get(name.split(".")[-1], "0.5"))
        page.keyboard.press("Enter")
        settled(page)
        assert page.url != before or page.get_by_role("alert").count() == 1, name
    for name in page.locator("#view select:visible").evaluate_all("all => all.map(e => e.name)"):
        select = page.locator(f'[id="f-{name}"]')
        if not select.count():
            continue  # it went with another choice
        other = select.evaluate("e => [...e.options].map(o => o.value).find(v => v !== e.value)")
        if other is not None:
            select.select_option(other)
            settled(page)
    assert page.locator("h1").count() == 1 and well(page, address)
    page.reload()  # the address alone brings the same state back
    assert well(page, address)


def test_the_address_is_the_state_and_back_goes_back(opened, address):
    page = opened("?screen=weight&loss=grpo")
    page.locator("#f-ratio").fill("2")
    page.keyboard.press("Enter")
    page.wait_for_function("() => location.search.includes('ratio=2')")
    settled(page)
    assert page.locator("#readings tbody td").first.inner_text() == "0"  # clipped: r = 2 is beyond 1.2
    page.get_by_role("link", name="A group").click()
    page.wait_for_function("() => location.search.includes('screen=group')")
    page.go_back()
    page.wait_for_function("() => location.search.includes('screen=weight') && document.title.startsWith('The weight')")
    assert well(page, address)


def test_the_mouse_reads_numbers_off_a_drawing(opened, address):
    page = opened("?screen=weight&loss=grpo&loss=cispo")
    box = page.locator(".drawing svg").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + box["height"] / 2)
    reading = page.locator(".reading").first
    assert reading.is_visible() and "A" in reading.inner_text() and "B" in reading.inner_text()
    page.mouse.click(box["x"] + box["width"] * 0.55, box["y"] + box["height"] / 2)
    page.wait_for_function("() => location.search.includes('ratio=')")
    settled(page)
    assert well(page, address)


def test_the_keyboard_reads_a_drawing_too(opened, address):
    page = opened("?screen=weight&loss=grpo")
    page.locator(".drawing svg").first.focus()
    page.keyboard.press("End")
    reading = page.locator(".reading").first
    assert reading.inner_text().split() == ["10", "A", "0"]  # clipped
    page.keyboard.press("Home")
    assert reading.inner_text().split() == ["0.1", "A", "0.1"]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_function("() => location.search.includes('ratio=0.1013')")
    settled(page)
    assert reading.is_visible() and page.locator("#f-ratio").input_value() == "0.1013" and well(page, address)


def test_keyboard_alone_finds_a_loss_changes_it_and_takes_it_away(opened, address):
    page = opened("?loss=grpo")
    page.locator("#f-q").focus()
    page.keyboard.type("rloo")
    page.wait_for_function("() => document.querySelector('#found a')")
    settled(page)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.chosen').length === 2")
    settled(page)
    assert page.evaluate("document.activeElement.id") == "f-q" and page.locator("#f-q").input_value() == ""
    page.keyboard.type("gspo(beta=0.1)")  # a whole call: Enter takes it
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.chosen').length === 3")
    settled(page)
    assert "gspo(beta=0.1)" in page.locator(".chosen").last.inner_text()
    page.locator(".chosen .drop").last.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.chosen').length === 2")
    settled(page)
    page.locator('[id="f-1.beta"]').focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("0.3")
    page.keyboard.press("Enter")
    page.wait_for_function("() => location.search.includes('0.3')")
    settled(page)
    page.locator(".chosen .drop").nth(0).focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.chosen').length === 1")
    assert well(page, address) and "rloo" in page.locator(".chosen").inner_text()


def test_the_tour_is_walked_with_the_enter_key(opened, address):
    page = opened("?tour=1&loss=grpo")
    for n in range(2, 11):
        page.locator(".turn a.primary").focus()
        page.keyboard.press("Enter")
        page.get_by_text(f"{n} of 10", exact=True).wait_for()
        settled(page)
    assert "lossmith train --loss grpo" in page.locator("main").inner_text() and well(page, address)


def test_a_refused_value_stays_in_its_field_beside_the_reason(opened, address):
    page = opened("?loss=grpo")
    page.locator('[id="f-0.clip_low"]').fill("-1")
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()
    assert "must be at least 0" in page.get_by_role("alert").inner_text() and well(page, address)


@pytest.fixture(scope="module")
def looked_at(chromium, address):  # noqa: F811
    """{look: one page that is taken from view to view}, as large screens, phones and dark ones have it."""
    phone = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}
    pages = {}
    for look, about in (("phone", phone), ("dark", {"color_scheme": "dark"})):
        page = pages[look] = chromium.new_context(**about).new_page()
        watched(page)
    yield pages
    for page in pages.values():
        page.context.close()


@pytest.mark.parametrize("view", VIEWS)
def test_it_fits_a_phone(looked_at, address, view):
    page = looked_at["phone"]
    page.goto(address + view)
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360 and well(page, address)


@pytest.mark.parametrize("view", VIEWS[:5] + VIEWS[-3:-2])
def test_in_the_dark_it_is_dark(looked_at, address, view):
    page = looked_at["dark"]
    page.goto(address + view)
    settled(page)
    papers = page.evaluate(
        "() => ['body', '.card, .chosen'].map(s => getComputedStyle(document.querySelector(s)).backgroundColor)"
    )
    assert all(max(map(int, re.findall(r"\d+", paper)[:3])) < 64 for paper in papers) and well(page, address)


HOSTILE = ["?loss=<img src=x onerror=alert(1)>", "?screen=nowhere", "?loss=os:system", "?steps=no&screen=truth"]


@pytest.mark.parametrize("view", HOSTILE)
def test_a_hostile_address_gives_words_on_the_page(looked_at, address, view):
    page = looked_at["phone"]
    page.goto(address + view)
    settled(page)
    said = page.locator(".notice:visible").first.inner_text()
    assert "Traceback" not in said and len(said) > 20 and page.locator("img").count() == 0 and well(page, address)


def test_a_view_as_a_file_opens_without_the_server(opened, tmp_path):
    file = export_view(tmp_path / "v.html", ["grpo", "rloo"], "screen=weight")
    page = opened(where=file.as_uri())
    box = page.locator(".drawing svg").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50)
    assert page.locator(".reading").first.is_visible() and page.wrong == [] and page.asked == [file.as_uri()]


def test_without_scripts_the_fields_are_a_form(opened, address):
    page = opened("?screen=weight&loss=grpo", java_script_enabled=False)
    page.locator("#f-ratio").fill("2")
    page.locator('[id="f-0.clip_high"]').fill("1.5")
    page.get_by_role("button", name="Show").click()
    assert page.locator("#readings tbody td").first.inner_text() == "2"


@pytest.fixture(scope="module", params=["light", "dark", "phone"])
def examined(request, chromium):  # noqa: F811
    """One page in this look, into which a script may be put."""
    context = chromium.new_context(bypass_csp=True, **LOOKS[request.param])
    yield context.new_page()
    context.close()


@pytest.mark.skipif("LOSSMITH_AXE" not in os.environ, reason="LOSSMITH_AXE names no axe.min.js")
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_no_fault(examined, address, view):
    examined.goto(address + view)
    settled(examined)
    examined.evaluate("() => document.querySelectorAll('details').forEach(folded => { folded.open = true; })")
    examined.add_script_tag(path=os.environ["LOSSMITH_AXE"])
    found = examined.evaluate("axe.run()")
    assert [(v["id"], v["nodes"][0]["html"][:120]) for v in found["violations"]] == [] and len(found["passes"]) > 10


@pytest.mark.skipif("LOSSMITH_SCREENSHOTS" not in os.environ, reason="LOSSMITH_SCREENSHOTS names no folder")
@pytest.mark.parametrize("look", ["light", "dark", "phone"])
@pytest.mark.parametrize("view", VIEWS)
def test_pictures(opened, look, view):
    page = opened(view, **LOOKS[look])
    name = re.sub(r"\W?(loss=\w+|screen=|part=)", "", view).strip("?&").replace("&", "-").replace("=", "-")
    place = Path(os.environ["LOSSMITH_SCREENSHOTS"])
    page.screenshot(path=place / f"explorer-{name}-{look}.png", full_page=True)

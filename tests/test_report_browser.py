"""The page about a run in a real browser: it asks for nothing, complains of nothing, and its table can be filtered."""

import re
import shutil

import pytest

import lossmith as ls
from test_report_page import copied, run  # noqa: F401 - a fixture

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("report")
    other = copied(run, folder / "other", loss="rloo", name="other")
    return ls.write_report([run, other], folder / "report.html")


@pytest.fixture
def opened(chromium, report):
    def go(**how):
        page = chromium.new_context(**how).new_page()
        page.set_default_timeout(30_000)
        page.wrong, page.asked = [], []
        page.on("console", lambda message: page.wrong.append(message.text))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("dialog", lambda dialog: (page.wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(report.as_uri())
        return page

    return go


@pytest.mark.parametrize("how", [{}, {"color_scheme": "dark"}, {"viewport": {"width": 390, "height": 844}}])
def test_it_asks_for_nothing_and_fits(opened, report, how):
    page = opened(**how)
    assert page.title() == "2 runs – Lossmith report"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.wrong == [] and page.asked == [report.as_uri()]


def test_the_table_is_filtered_and_sorted(opened):
    page = opened()
    rows = page.locator("#rows tbody tr")
    visible = page.locator("#rows tbody tr:visible")
    assert rows.count() == 54
    page.get_by_label("Run", exact=True).select_option("other")
    page.get_by_label("Step", exact=True).select_option("2")
    assert visible.count() == 9 and page.locator("#controls [role=status]").inner_text() == "9 of 54 shown"
    page.get_by_role("button", name="score").click()
    scores = [float(x) for x in visible.locator("td:nth-child(6)").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    visible.first.get_by_role("button").click()
    assert re.fullmatch(
        r"lossmith explain \S+/other --step 1 --prompt \S+ --sample \d", page.locator("#how").inner_text()
    )
    page.get_by_label("Score at least").fill(str(scores[0]))
    assert visible.count() == scores.count(scores[0])
    page.get_by_label("Text in prompt or completion").fill("no such text")
    assert visible.count() == 0 and page.wrong == []


def test_without_scripts_all_is_there(opened):
    page = opened(java_script_enabled=False)
    assert page.locator("#rows tbody tr").count() == 54 and page.locator("#controls *").count() == 0
    assert page.locator(".chart svg").count() >= 10 and page.locator("math").count() >= 4

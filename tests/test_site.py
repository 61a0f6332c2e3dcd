"""The documentation as a site: it builds without a warning, needs no network, and has a page for each loss."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from lossmith.losses import CATALOGUE

ROOT = Path(__file__).parent.parent
NAMED = [name for name, entry in CATALOGUE.items() if not entry.preset_of]
pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stdout + result.stderr
    return folder


class Page(HTMLParser):
    """Where a page leads, what it loads, and which places in it can be led to."""

    def __init__(self, path):
        super().__init__()
        self.leads, self.loads, self.places = set(), set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.places |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.leads.add(found["href"])
        if tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.loads.add(found["src"])
        if tag == "link" and found.get("href") and found.get("rel") != "canonical":
            self.loads.add(found["href"])


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_nothing_is_loaded_from_another_place(site, pages):
    for path, page in pages.items():
        elsewhere = {x for x in page.loads if re.match(r"(https?:)?//", x)}
        assert not elsewhere, (path, elsewhere)
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\((?:https?:)?//[^)]*|@import", style.read_text(encoding="utf-8")), style


def test_every_link_and_every_picture_leads_somewhere(site, pages):
    for path, page in pages.items():
        for target in page.leads | page.loads:
            if re.match(r"[a-z]+:|//", target) or path.name == "404.html":
                continue
            place, anchor = urldefrag(target)
            there = (path.parent / unquote(place)).resolve() if place else path
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), (path.relative_to(site), target)
            if anchor and there in pages and not anchor.startswith("__"):
                assert unquote(anchor) in pages[there].places, (path.relative_to(site), target)


@pytest.mark.parametrize("name", NAMED)
def test_every_loss_has_a_page_with_its_formula_listing_and_figures(site, name):
    text = (site / "losses" / name / "index.html").read_text(encoding="utf-8")
    assert "<math" in text or "L(θ)" in text or "L = " in text
    for title in ("formula", "weight", "in-plain-torch", "what-was-measured", "choices-and-parameters", "use-it"):
        assert f'id="{title}"' in text
    presets = [entry.name for entry in CATALOGUE.values() if entry.preset_of == name]
    assert all(preset in text for preset in presets)


def test_the_table_of_proofs_leads_to_the_pages_of_losses(site):
    text = (site / "proofs" / "index.html").read_text(encoding="utf-8")
    assert '<a href="../losses/grpo/">grpo</a>' in text and "sort.js" in text


def test_the_glossary_is_that_of_contributing(site):
    text = (site / "glossary" / "index.html").read_text(encoding="utf-8")
    rows = re.search(r"## Glossary\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M | re.S)[1]
    assert text.count("<tr>") == rows.count("\n| ")


@pytest.mark.browser
def test_a_long_table_is_sorted_by_mouse_and_keyboard_and_filtered(site):
    import shutil

    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        said = []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((site / "proofs" / "index.html").as_uri())
        head = page.locator("th", has_text="residual").first
        names = "() => [...document.querySelector('table').tBodies[0].rows].map(r => r.cells[3].textContent)"
        head.click()
        numbers = [float(x) for x in page.evaluate(names) if re.fullmatch(r"[\d.e+-]+", x)]
        assert numbers == sorted(numbers) and len(numbers) > 100
        head.press("Enter")
        numbers = [float(x) for x in page.evaluate(names) if re.fullmatch(r"[\d.e+-]+", x)]
        assert numbers == sorted(numbers, reverse=True)
        page.fill("input.filter", "grpo@verl")
        left = page.locator("table >> nth=0 >> tbody tr:visible").all_inner_texts()
        assert left and all("grpo@verl" in row for row in left)
        assert [x for x in said if "search_index" not in x] == []  # search needs a server, as mkdocs serve is one
        browser.close()

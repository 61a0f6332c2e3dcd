"""What mkdocs calls while it builds the site: pages that are generated, and links that lead to them.

docs/ stays readable on its own. README.md, CONTRIBUTING.md and CHANGELOG.md stand in the root; losses, commands and the
API are asked of the library, so that no fact is written twice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(ROOT / "src"))

import loss_pages  # noqa: E402
import reference_pages  # noqa: E402

WIDE = ("proofs.md", "hooks.md")  # their tables take the whole width
STATIC = ("website/extra.css", "website/sort.js", "website/mark.svg")


def on_config(config: Any) -> Any:
    """The menu of losses, and whatever page of docs/ nobody has given a place in it."""
    losses = next(part for part in config.nav if "Losses" in part)
    losses["Losses"] = [{"All losses": "losses/index.md"}, {"The catalogue on one page": "catalogue.md"}]
    losses["Losses"] += [{title: [{n: f"losses/{n}.md"} for n in names]} for title, names in loss_pages.families()]
    known = set(_places(config.nav))
    rest = sorted(p.name for p in (ROOT / "docs").glob("*.md") if p.name not in known)
    if rest:
        guides = next(part for part in config.nav if "Guides" in part)
        guides["Guides"] += rest
    return config


def on_files(files: Files, config: Any) -> Files:
    """Everything that docs/ does not hold."""
    for name, text in _generated():
        files.append(File.generated(config, name, content=text))
    for name in STATIC:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Losses that a table names lead to their pages; links out of docs/ lead to what stands in the root."""
    name = page.file.src_uri
    if name in WIDE:
        page.meta["hide"] = ["toc"]
    if name in ("proofs.md", "hooks.md", "catalogue.md"):
        markdown = loss_pages.linked(markdown)
    return _to_the_root(markdown) if "/" not in name else markdown


def _generated() -> Iterator[tuple[str, str]]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    yield "index.md", readme.replace("](docs/", "](")
    yield "contributing.md", contributing.replace("](docs/", "](")
    yield "glossary.md", _glossary(contributing)
    yield "changelog.md", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    yield "commands.md", reference_pages.commands()
    yield "api.md", reference_pages.api()
    yield from loss_pages.pages()


def _glossary(contributing: str) -> str:
    """CONTRIBUTING.md's, as a page."""
    part = re.search(r"^## Glossary\n(.*?)(?=^## )", contributing, re.MULTILINE | re.DOTALL)
    assert part is not None, "CONTRIBUTING.md has lost its glossary"
    return "# Glossary\n" + part[1]


def _to_the_root(markdown: str) -> str:
    for there, here in (("../README.md", "index.md"), ("../CONTRIBUTING.md", "contributing.md")):
        markdown = markdown.replace(f"]({there}", f"]({here}")
    markdown = re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)  # what stands in no page: its name alone
    return markdown.replace("](CONTRIBUTING.md", "](contributing.md").replace("](CHANGELOG.md", "](changelog.md")


def _places(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _places(part)

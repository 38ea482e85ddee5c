"""The site of `make docs`: its navigation has every page, links lead to pages of it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAV = re.findall(
    r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2], re.MULTILINE
)
MKDOCS = shutil.which("mkdocs", path=str(ROOT / ".venv-docs" / "bin")) or shutil.which("mkdocs")


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = hooks()


def test_the_navigation_has_every_page() -> None:
    pages = {str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")}
    outside = {page for page in HOOKS.SOURCES if not page.startswith("repository/recipes/")}
    assert len(NAV) == len(set(NAV)) > 25
    assert set(NAV) == pages | outside


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {file.name for file in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


def test_pages_from_outside_exist() -> None:
    assert all((ROOT / file).is_file() for file in HOOKS.SOURCES.values())
    recipes = {f"repository/recipes/{file.parent.name}.md" for file in ROOT.glob("recipes/*/README.md")}
    assert recipes <= HOOKS.SOURCES.keys()


@pytest.mark.parametrize(
    ("site", "text", "becomes"),
    [
        ("gates.md", "[x](report.md#a)", "[x](report.md#a)"),
        ("gates.md", "[x](../README.md#a)", "[x](repository/readme.md#a)"),
        ("gates.md", "[x](../bench/results) and [y](#z)", "x and [y](#z)"),
        ("repository/readme.md", "![x](docs/report.png)", "![x](../report.png)"),
        ("repository/readme.md", "[`run/`](pipeline/requant/run/__init__.py)", "`run/`"),
        ("repository/recipes/qwen3-8b.md", "[x](../README.md#b)", "[x](../recipes.md#b)"),
        ("repository/recipes/qwen3-8b.md", "[x](../../docs/texts.md)", "[x](../../texts.md)"),
        ("index.md", "[x](https://example.com/a.md)", "[x](https://example.com/a.md)"),
    ],
)
def test_links_as_seen_from_the_site(site: str, text: str, becomes: str) -> None:
    assert HOOKS.linked(text, site) == becomes


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; mkdocs --strict makes an error of every warning."""
    if MKDOCS is None:
        pytest.skip("no mkdocs here (make .venv-docs/.ready installs it)")
    out = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [MKDOCS, "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


class Links(HTMLParser):
    """What a page of HTML points to, and the names in it."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if value and key in ("href", "src"):
                self.targets.add(value)
            elif value and key in ("id", "name"):
                self.names.add(value)


def read_links(text: str) -> Links:
    links = Links()
    links.feed(text)
    return links


@pytest.mark.slow
def test_every_link_of_the_site_leads_to_a_file_and_a_name_in_it(site: Path) -> None:
    """Of the HTML, so also of what no Markdown holds: signatures, tables of contents, images, styles."""
    pages = {file: read_links(file.read_text()) for file in site.rglob("*.html") if file.name != "404.html"}
    broken = []
    for file, found in pages.items():
        for link in found.targets:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (file.parent / unquote(address.path)).resolve() if address.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (address.fragment and unquote(address.fragment) not in pages[target].names):
                broken.append(f"{file.relative_to(site)}: {link}")
    assert broken == []
    assert len(pages) > 40
    assert sum(len(found.targets) for found in pages.values()) > 2000


@pytest.mark.slow
def test_nothing_on_the_site_is_loaded_from_elsewhere(site: Path) -> None:
    for file in site.rglob("*.html"):
        assert (
            re.findall(
                r"<(?:script|img|iframe)[^>]* src=\"?(?:https?:)?//|<link[^>]*stylesheet[^>]*//", file.read_text()
            )
            == []
        )


@pytest.mark.slow
def test_the_api_page_has_signatures_and_lists_of_parameters(site: Path) -> None:
    page = (site / "api" / "index.html").read_text()
    text = re.sub(r"<[^>]+>", "", page)
    assert "Run a recipe, or the recipe in a file, up to and including the stage" in text
    assert re.search(r"<li>\s*(?:<p>)?<code>suggest</code>: before the report", page)
    assert re.search(r"run\(\s*wanted: Recipe \| str \| Path,\s*\*,", text)
    assert text.count(":::") == 1  # in the sentence that names it


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120

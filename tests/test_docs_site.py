"""The site of `make docs`: its navigation has every page, links lead to pages of it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

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


@pytest.mark.slow
@pytest.mark.skipif(MKDOCS is None, reason="no mkdocs here (make docs installs one)")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(MKDOCS), "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "GPTQ" in (tmp_path / "site" / "repository" / "readme" / "index.html").read_text()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120

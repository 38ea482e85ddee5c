"""Hooks of mkdocs: pages of the repository outside docs/, and links to them, in the site.

A link to any other file of the repository (a source, a result) becomes plain text: it is not in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "repository/readme.md",
    "CONTRIBUTING.md": "repository/contributing.md",
    "SECURITY.md": "repository/security.md",
    "CHANGELOG.md": "repository/changelog.md",
    "AGENTS.md": "repository/agents.md",
    "bench/NOTES.md": "repository/notes.md",
    "recipes/README.md": "repository/recipes.md",
    "recipes": "repository/recipes.md",
} | {
    f"recipes/{file.parent.name}/README.md": f"repository/recipes/{file.parent.name}.md"
    for file in sorted(ROOT.glob("recipes/*/README.md"))
}
"""File of the repository -> its page in the site."""
SOURCES = {page: file for file, page in PAGES.items() if file.endswith(".md")}
FENCE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside docs/."""
    from mkdocs.structure.files import File

    for page, file in SOURCES.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as seen from the site; lists inside of numbered ones indented by four, as Python-Markdown wants them."""
    site = page.file.src_uri
    parts = FENCE.split(markdown)
    parts[::2] = [re.sub(r"^ {3}(?=[-*] )", "    ", linked(part, site), flags=re.MULTILINE) for part in parts[::2]]
    return "".join(parts)


def linked(text: str, site: str) -> str:
    """`text` of the page `site` with links that lead to pages of the site, or without them."""
    here = posixpath.dirname(SOURCES.get(site, f"docs/{site}"))

    def changed(found: re.Match[str]) -> str:
        image, words, link = found.groups()
        file, mark, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:") or not file:
            return found[0]
        target = posixpath.normpath(posixpath.join(here, file))
        page = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if page is None:
            return str(words)
        return f"{image}[{words}]({posixpath.relpath(page, posixpath.dirname(site) or '.')}{mark}{anchor})"

    return LINK.sub(changed, text)

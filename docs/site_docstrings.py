"""Docstrings as Markdown for docs/api.md: parameters and errors as lists."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Raises|Args):\n((?: {4}.*\n?)+)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\w+): ", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Changes the docstring of every function and class that is read."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring:
            func.docstring.value = as_markdown(func.docstring.value, [p.name for p in func.parameters])

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring:
            cls.docstring.value = as_markdown(cls.docstring.value, list(cls.members))


def as_markdown(text: str, names: list[str]) -> str:
    """A docstring where each `name: ...` of `names` and each error is an item of a list; code stays as it is."""
    text = SECTION.sub(lambda found: f"{found[1]}:\n\n" + ENTRY.sub(r"- `\1`: ", found[2]), text)
    return "\n\n".join(_paragraph(part, names) for part in re.split(r"\n{2,}", text))


def _paragraph(text: str, names: list[str]) -> str:
    """One paragraph. A line that begins a sentence, and no item, ends the item before it."""
    one = "|".join(map(re.escape, names))
    start = re.compile(rf"(?:\A|(?<=\.)\s+)((?:{one})(?:, (?:{one}))*): ")
    if text.startswith(("    ", "- ")) or not names or not start.search(text):
        return text
    text = start.sub(r"\0- `\1`: ", re.sub(r"(?<=\.)\n(?=[A-Z`]|Raises)", "\n\n", text))
    first, *items = text.split("\0")
    return "\n\n".join(part for part in (first.strip(), "\n".join(items)) if part)

"""Messages that docs/troubleshooting.md quotes are messages of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\| ([^|]*) \|", PAGE.read_text(), re.MULTILINE)))
PIECES = sorted(
    {piece.strip() for text in QUOTED if " " in text for piece in text.split("...") if " " in piece.strip()}
)


def said() -> str:
    """All texts of the code, a line each, with `{}` for what is filled in."""
    found = []
    for file in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


CODE = said()


@pytest.mark.parametrize("piece", PIECES)
def test_a_quoted_message_is_one_of_the_code(piece: str) -> None:
    """Any word of it may be filled in."""
    found = " ".join(rf"(?:{re.escape(word)}|\{{\}}\W*)" for word in piece.strip("():;,? ").split())
    assert re.search(found, CODE)


def test_messages_are_found() -> None:
    assert len(PIECES) > 20
    assert "a message that nobody wrote" not in CODE

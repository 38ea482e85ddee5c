"""Prints documents as the model will see them, with what is scored marked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from requant.run.prepared import Prepared

OPEN, CLOSE = "\u27e6", "\u27e7"
BOLD, PLAIN = "\x1b[1;4m", "\x1b[0m"


def print_texts(prepared: Prepared, count: int) -> None:
    """Print the first `count` documents of every calibration source and evaluation set."""
    from requant.run.check.sample_texts import sample_texts

    terminal = sys.stdout.isatty()
    before, after = (BOLD, PLAIN) if terminal else (OPEN, CLOSE)
    how = "in bold" if terminal else f"between {OPEN} and {CLOSE}"
    print(f"text      special tokens are shown; of evaluation texts, what is scored is {how}")
    for sample in sample_texts(prepared, count):
        print(f"--- {sample.title}")
        print("".join(f"{before}{text}{after}" if scored else text for text, scored in map(_safe, sample.parts)))
    print("---")


def _safe(part: tuple[str, bool]) -> tuple[str, bool]:
    """The text without control characters, which a terminal would obey."""
    text, scored = part
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text), scored

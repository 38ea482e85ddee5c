"""Prints documents as the model will see them, with what is scored marked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from requant.outgoing import masked
from requant_eval.escaping import one_line, visible

if TYPE_CHECKING:
    from requant.run.prepared import Prepared

SHOWN = 3000  # characters of a document
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
        print(f"--- {one_line(masked(sample.title))}")
        parts, more = _beginning([(visible(masked(text)), scored) for text, scored in sample.parts])
        print("".join(f"{before}{text}{after}" if scored else text for text, scored in parts) + more)
    print("---")


def _beginning(parts: list[tuple[str, bool]]) -> tuple[list[tuple[str, bool]], str]:
    """The first `SHOWN` characters, and how many more there are."""
    shown, left = [], SHOWN
    for text, scored in parts:
        shown.append((text[:left], scored))
        left = max(left - len(text), 0)
    more = sum(len(text) for text, _ in parts) - SHOWN
    return [part for part in shown if part[0]], f" ... ({more} more characters)" if more > 0 else ""

"""Text for a terminal: wrapped between words, without what a terminal would obey."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TextIO

from requant.outgoing import masked
from requant_eval.escaping import visible


def wrapped(text: str, width: int, indent: int = 0) -> str:
    """`text` in lines of at most `width`, broken between words only; later lines are indented."""
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrapper.fill(line) for line in text.splitlines())


def say(text: str, *, indent: int = 0, file: TextIO | None = None) -> None:
    """Print text: wrapped at words on a terminal, one line elsewhere."""
    stream, text = file or sys.stdout, visible(masked(text))
    shown = wrapped(text, shutil.get_terminal_size().columns, indent) if stream.isatty() else text
    print(shown, file=stream, flush=True)

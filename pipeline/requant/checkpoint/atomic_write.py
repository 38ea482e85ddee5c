"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from requant.errors import StageError

TEMPORARY = ".*.tmp"  # glob of the temporary names; those of the judge match it too


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Give a temporary name beside `file`, and rename it to `file` when the block ends.

    After an error in the block `file` is as it was, and the temporary file is removed. A killed process leaves the
    temporary file: the next write of the same file replaces it, and `TEMPORARY` finds it.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a small file at once: readers see the old text or the new one, never a part."""
    try:
        with atomic_write(file) as temporary, temporary.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise StageError(f"{file}: write failed ({error.strerror or error})") from error

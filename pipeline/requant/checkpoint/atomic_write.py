"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from requant.errors import InputError, StageError

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


def require_new(file: Path) -> None:
    """Raise InputError for a file that exists, or whose directory does not."""
    if os.path.lexists(file):
        raise InputError(f"{file}: exists, and is left as it is: choose another name, or remove it first")
    if not file.parent.is_dir():
        raise InputError(f"{file}: there is no directory {file.parent}: make it first")


def write_new(file: Path, text: str) -> None:
    """Write a small file that must not exist: afterwards it is there whole, or not at all.

    Raises InputError as `require_new`, and when the file cannot be written.
    """
    require_new(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.link(temporary, file)  # unlike a rename it never replaces
    except FileExistsError:
        require_new(file)
        raise
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)

"""Files of ours: whole or absent, through no link; a failure is a StageError with a name.

The way of writing itself is `requant_eval.whole_files`, the only place that opens files for writing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from safetensors import SafetensorError

from requant.errors import InputError, RequantError, StageError
from requant_eval import whole_files
from requant_eval.errors import EvaluationError
from requant_eval.regular_files import open_regular, require_regular
from requant_eval.whole_files import TEMPORARY

__all__ = [
    "DAMAGED", "TEMPORARY", "append_text", "atomic_write", "copy_file", "link_file", "make_directory", "read_state",
    "reading", "remove", "require_new", "write_new", "write_text", "writing",
]  # fmt: skip
T = TypeVar("T")
DAMAGED = logging.getLogger("requant.damaged")
"""What a run keeps for itself and finds damaged; a run shows these lines as warnings."""
_UNREADABLE = (
    RequantError, EvaluationError, SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError,
    AttributeError, RuntimeError,
)  # fmt: skip


@contextmanager
def writing(file: Path, size: int | None = None) -> Iterator[None]:
    """Turn an OSError inside into a StageError that names `file`; of a full disk with bytes needed and free."""
    try:
        yield
    except OSError as error:
        named = Path(error.filename) if error.filename and not isinstance(error.filename, int) else file
        raise StageError(f"{named}: write failed ({whole_files.reason(error, file, size)})") from error


@contextmanager
def reading(file: Path) -> Iterator[BinaryIO]:
    """A regular file that somebody gave, open for reading; an OSError of opening it becomes an InputError."""
    try:
        opened = open_regular(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
    with opened:
        yield opened


@contextmanager
def atomic_write(file: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """Give an open file to fill, which becomes `file` when the block ends.

    After an error in the block `file` is as it was, and nothing else is left. size: its bytes, where they are known.
    """
    with writing(file, size), whole_files.whole_file(file, size) as handle:
        yield handle


def write_text(file: Path, text: str) -> None:
    """Write a small file at once: readers see the old text or the new one, never a part."""
    with writing(file):
        whole_files.write(file, text.encode())


def append_text(file: Path, text: str) -> None:
    """Add text to a file that grows; a link in its place is refused."""
    with writing(file):
        whole_files.append(file, text)


def copy_file(source: Path, file: Path) -> None:
    """Copy a regular file's content, through a link such as the hub cache's; directories that `file` lies in are made.

    Raises InputError for a source that cannot be read.
    """
    with reading(source) as content, writing(file):
        whole_files.make_directory(file.parent)
        whole_files.copy(content, file)


def link_file(source: Path, file: Path) -> None:
    """Give a file of another run a name here, or copy it where that cannot be; directories are made.

    Files of ours are replaced, never changed: what the other run does later leaves this one's as it is.
    """
    with writing(file):
        whole_files.make_directory(file.parent)
        if not whole_files.link(source, file):
            copy_file(source, file)


def make_directory(path: Path) -> Path:
    """Make a directory of ours; a link in its place is refused."""
    with writing(path):
        return whole_files.make_directory(path)


def remove(path: Path) -> None:
    """Remove a file or directory of ours; of a link, the link alone."""
    with writing(path):
        whole_files.remove(path)


def read_state(file: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` makes of a file that a run keeps for itself; None where it is missing or unreadable.

    An unreadable state is no state: one line says so, the file is removed, and what it held is made again. So it is
    with what is no file: opening a pipe would wait for its writer.
    """
    if not file.exists():
        return None
    try:
        require_regular(file)
        return read(file)
    except _UNREADABLE as error:
        why = " ".join(str(error).replace(f"{file}: ", "").split())[:200] or type(error).__name__
        DAMAGED.warning("%s: not readable (%s): what it held is made again", file, why)
        remove(file)
        return None


def require_new(file: Path) -> None:
    """Raise InputError for a file that exists, or whose directory does not."""
    if file.exists() or file.is_symlink():
        raise InputError(f"{file}: exists, and is left as it is: choose another name, or remove it first")
    if not file.parent.is_dir():
        raise InputError(f"{file}: there is no directory {file.parent}: make it first")


def write_new(file: Path, text: str) -> None:
    """Write a small file that must not exist: afterwards it is there whole, or not at all.

    Raises InputError as `require_new`, and when the file cannot be written.
    """
    require_new(file)
    try:
        whole_files.write_new(file, text.encode())
    except FileExistsError:
        require_new(file)
        raise
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror or error}") from error

"""Files that a command line asks for, the standard streams, errors of writing in one line."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from requant.errors import InputError
from requant_eval import whole_files


def require_output(*files: Path | None) -> None:
    """Raise InputError unless each file can be written: before the work, not after it.

    A link in its place is neither followed nor replaced. None: a file that was not asked for.
    """
    for file in filter(None, files):
        if file.is_symlink():
            raise InputError(f"{file}: is a link to {file.readlink()}: name that file itself, or remove the link")
        if file.exists() and not file.is_file():
            raise InputError(f"{file}: is no regular file: choose another name")
        if not file.parent.is_dir():
            raise InputError(f"{file}: there is no directory {file.parent}: make it first")


def write_output(file: Path, text: str) -> None:
    """Write a file that was asked for, whole or not at all.

    Raises InputError as `require_output`, OSError with its name when it cannot be written.
    """
    require_output(file)
    whole_files.write(file, text.encode())


def message(error: OSError) -> str:
    """An OSError as one line that names what could not be read or written."""
    named = error.filename if isinstance(error.filename, str | bytes) else None
    what = os.fsdecode(named) if named is not None else "the output of this command"
    return (
        f"{what}: {whole_files.reason(error, Path(what))}"
        if named is not None
        else f"{what}: {error.strerror or error}"
    )


def open_streams() -> None:
    """Open what is closed of descriptors 0 to 2 and of Python's streams: a file must not get one of their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until exit


def close_stdout() -> OSError | None:
    """Write what is left of stdout; the error, if a closed pipe or a full disk does not take it.

    Python would try again at its end, and say so in lines of its own.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return error
    return None

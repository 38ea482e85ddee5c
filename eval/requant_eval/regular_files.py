"""The only place that opens files for reading: regular files, no pipe and no device.

Opening a pipe waits for its writer, reading a device may give bytes without an end; neither is begun here. Imports
nothing of ours and nothing heavy.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


class NotAFileError(OSError):
    """What has the name is a directory, a device or a pipe, or no file can have it. `strerror` says which."""


def open_regular(file: str | Path) -> BufferedReader:
    """A regular file, open for reading its bytes; a link to one is followed.

    Raises NotAFileError at once for anything else, OSError where it is missing or cannot be read.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, half a surrogate pair
        raise NotAFileError(errno.EINVAL, f"no file can have this name ({error})", str(file)) from error
    try:
        _require(os.fstat(descriptor), file)
    except NotAFileError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def require_regular(file: str | Path) -> None:
    """Raise NotAFileError for what is no regular file, before a library opens it by its name; OSError as above."""
    try:
        _require(os.stat(file), file)
    except ValueError as error:
        raise NotAFileError(errno.EINVAL, f"no file can have this name ({error})", str(file)) from error


def what_else(found: os.stat_result) -> str | None:
    """What was found in place of a regular file, in words; None: it is one."""
    if stat.S_ISREG(found.st_mode):
        return None
    return f"{'a directory' if stat.S_ISDIR(found.st_mode) else 'a device or a pipe'}, expected a file"


def read_bytes(file: str | Path, most: int = -1) -> bytes:
    """The content of a regular file, or its first `most` bytes. Raises as `open_regular`."""
    with open_regular(file) as opened:
        return opened.read(most)


def _require(found: os.stat_result, file: str | Path) -> None:
    if (other := what_else(found)) is not None:
        raise NotAFileError(errno.EINVAL, other, str(file))

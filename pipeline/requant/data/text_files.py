"""Bytes of a stranger's data file within limits: no pipe, no device, no bomb."""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from pathlib import Path

from requant.errors import InputError

LARGEST = 4 * 10**9  # bytes; rows are held in memory
LARGEST_PACKED = 10**8  # what any .gz file may unpack to; beyond that at most RATIO times its size
RATIO = 100  # text is rarely packed to less than a twentieth


def read_data(path: Path) -> bytes:
    """The bytes of a file, unpacked where its name ends in .gz.

    Raises InputError: it is missing, no regular file, cannot be read or unpacked, or holds more than can be meant.
    """
    try:
        # Opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a device or a pipe"
        raise InputError(f"{path}: cannot be read: it is {kind}, expected a file")
    with os.fdopen(descriptor, "rb") as file:
        packed = path.suffix == ".gz"
        most = min(LARGEST, max(LARGEST_PACKED, RATIO * found.st_size)) if packed else LARGEST
        try:
            opened = gzip.GzipFile(fileobj=file) if packed else file
            data = _read(opened, most + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error
    if len(data) > most:
        how = f"unpacks to more than {most / 1e6:,.0f} MB" if packed else f"is larger than {most / 1e9:.0f} GB"
        raise InputError(f"{path}: {how}: make a file of the documents that are needed (calibration reads a few MB)")
    return data


def _read(file: io.BufferedIOBase, most: int) -> bytes:
    """At most `most` bytes, a part at a time: the memory that a file needs is not known before."""
    parts, left = [], most
    while left and (part := file.read(min(left, 2**24))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)

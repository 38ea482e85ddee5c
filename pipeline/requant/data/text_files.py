"""Bytes of a stranger's data file, read as needed and within limits: no pipe, no bomb."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from requant.errors import InputError
from requant_eval.regular_files import open_regular

LARGEST = 4 * 10**9  # bytes that are read of a file; its rows are held in memory
LARGEST_PACKED = 10**8  # bytes that are read of what a .gz file unpacks to, however small it is
MOST_TIMES = 20  # its own size are read of a larger one: text packs to a third or a tenth, a bomb to a thousandth
_AT_ONCE = 2**18


@contextmanager
def open_data(path: Path) -> Iterator[io.BufferedReader[Any]]:
    """The bytes of a file, unpacked where its name ends in .gz.

    Raises InputError, then or while it is read: it is missing, no regular file, cannot be read or unpacked, or more of
    it is read than can be meant.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    with file, io.BufferedReader(_Bounded(path, file), _AT_ONCE) as opened:
        yield opened


class _Bounded(io.RawIOBase):
    """An open file, unpacked where its name says so, that gives no more than the limit."""

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.path, self.packed = path, path.suffix == ".gz"
        self.content: Any = gzip.GzipFile(fileobj=file) if self.packed else file
        self.most = LARGEST
        if self.packed:
            self.most = min(LARGEST, max(LARGEST_PACKED, MOST_TIMES * os.fstat(file.fileno()).st_size))
        self.left = self.most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            got: int = self.content.readinto(buffer)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{self.path}: cannot be read: {error}") from error
        self.left -= got
        if self.left >= 0:
            return got
        if self.packed:
            raise InputError(
                f"{self.path}: unpacks to more than {self.most / 1e6:.0f} MB: set data.documents to use the first "
                "ones, or unpack it"
            )
        raise InputError(
            f"{self.path}: is larger than {LARGEST / 1e9:.0f} GB: set data.documents to use the first ones, or make a "
            "file of those that are needed (calibration reads a few MB)"
        )

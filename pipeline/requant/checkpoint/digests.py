"""Digests (sha256) of files, each computed once while the file stays what it was.

A file is known again by device, inode, size and the times of its last change to content and status: a copy that keeps
size and time has another inode or status time, and is read again. What is read again and has the same content has the
same digest, so nothing is repeated for a directory that was moved or copied.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from requant.checkpoint.reader import READERS, file_digest
from requant.errors import StageError

FRESH = 50_000_000  # ns after a change in which a second one could leave the same time
_HASHING = threading.BoundedSemaphore(READERS)


def stamp_of(file: Path) -> str:
    """What tells whether a file is still the one that was read; OSError where it cannot be looked at."""
    found = file.stat()
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


class Digests:
    """Digests of files by their stamps; several threads may ask."""

    def __init__(self) -> None:
        self._known: dict[str, Future[str]] = {}
        self._lock = threading.Lock()

    def learn(self, known: Mapping[str, str]) -> None:
        """Take over what an earlier process computed: stamp -> digest."""
        for stamp, digest in known.items():
            self._known.setdefault(stamp, _done(digest))

    def ahead(self, file: Path) -> None:
        """Begin with the digest of a file that this process has just written to its end."""
        future, mine = self._claim(stamp_of(file))
        if mine:  # no thread of a pool: those are waited for when a run is interrupted
            threading.Thread(target=_compute, args=(file, future), daemon=True).start()

    def of(self, file: Path) -> str:
        """A file's sha256; raises StageError when it cannot be read, or changes meanwhile."""
        try:
            changed = file.stat().st_ctime_ns
            if time.time_ns() - changed < FRESH and stamp_of(file) not in self._known:
                return file_digest(file)  # not remembered
            stamp = stamp_of(file)
            future, mine = self._claim(stamp)
            if mine:
                _compute(file, future)
            if stamp_of(file) != stamp:
                raise StageError(f"{file}: changes while it is read: let nothing write to it, and run again")
            return future.result()
        except OSError as error:
            raise StageError(f"{file}: cannot be read ({error.strerror or error})") from error

    def of_all(self, files: Iterable[Path]) -> list[str]:
        """The digests of several files, computed in threads."""
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self.of, files))

    def remembered(self, file: Path) -> tuple[str, str] | None:
        """(stamp, digest) of a file whose digest is known."""
        stamp = stamp_of(file)
        future = self._known.get(stamp)
        return (stamp, future.result()) if future is not None and future.done() and not future.exception() else None

    def _claim(self, stamp: str) -> tuple[Future[str], bool]:
        """The digest of a stamp, and whether the caller must compute it."""
        with self._lock:
            known = self._known.get(stamp)
            if known is not None and not (known.done() and known.exception()):
                return known, False
            future = self._known[stamp] = Future()
            return future, True


DIGESTS = Digests()


def _done(digest: str) -> Future[str]:
    future: Future[str] = Future()
    future.set_result(digest)
    return future


def _compute(file: Path, future: Future[str]) -> None:
    try:
        with _HASHING:
            future.set_result(file_digest(file))
    except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
        future.set_exception(error)


def hub_blob(file: Path) -> str | None:
    """The sha256 that the hub's cache names a file by; None outside of that cache's layout.

    CACHE/models--OWNER--NAME/snapshots/REVISION/FILE is a link to CACHE/models--OWNER--NAME/blobs/SHA256.
    """
    real = Path(os.path.realpath(file))
    store = real.parent.parent
    inside = real.parent.name == "blobs" and store.name.startswith("models--")
    linked = file.is_symlink() and (store / "snapshots") in Path(os.path.realpath(file.parent)).parents
    named = len(real.name) == 64 and set(real.name) <= set("0123456789abcdef")
    return real.name if inside and linked and named else None

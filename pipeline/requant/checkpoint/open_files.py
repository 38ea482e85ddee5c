"""Files filled in place, of which few are open at a time.

A checkpoint may have hundreds of shards, and systems allow a process 256 or 1024 open files. The one that was unused
for longest is closed when another is opened.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

MOST = 64


class OpenFiles:
    """Open files by path. Threads may use the same file, and others, at once.

    reopen: opens a file again that was closed meanwhile. most: files that stay open while no thread uses them.
    """

    def __init__(self, reopen: Callable[[Path], FileIO], most: int = MOST) -> None:
        self.reopen, self.most = reopen, most
        self._open: OrderedDict[Path, FileIO] = OrderedDict()  # the last used one last
        self._users: dict[Path, int] = {}
        self._unsynced: set[Path] = set()
        self._lock = threading.Lock()

    def add(self, file: Path, handle: FileIO) -> None:
        """Keep a file that was just made or opened; what was written to it is not on the disk yet."""
        with self._lock:
            self._open[file] = handle
            self._unsynced.add(file)
            self._close_unused()

    @contextmanager
    def writing(self, file: Path) -> Iterator[FileIO]:
        """A file of those that were added, open while the block writes to it."""
        with self._lock:
            self._unsynced.add(file)
        with self._used(file) as handle:
            yield handle

    def sync(self, sync: Callable[[FileIO], None]) -> None:
        """Call `sync` for every file that was written since the last time, also those closed meanwhile."""
        with self._lock:
            pending, self._unsynced = sorted(self._unsynced), set()
        for i, file in enumerate(pending):
            try:
                with self._used(file) as handle:
                    sync(handle)
            except BaseException:
                with self._lock:
                    self._unsynced.update(pending[i:])
                raise

    def close(self) -> None:
        """Close all files as they are."""
        with self._lock:
            for handle in self._open.values():
                handle.close()
            self._open.clear()

    @contextmanager
    def _used(self, file: Path) -> Iterator[FileIO]:
        with self._lock:
            if file not in self._open:
                self._open[file] = self.reopen(file)
            self._open.move_to_end(file)
            self._users[file] = self._users.get(file, 0) + 1
            handle = self._open[file]
            self._close_unused()
        try:
            yield handle
        finally:
            with self._lock:
                self._users[file] -= 1

    def _close_unused(self) -> None:
        """Close the files that were unused for longest, down to `most`; the lock is held."""
        for file in list(self._open):
            if len(self._open) <= self.most:
                return
            if not self._users.get(file):
                self._open.pop(file).close()

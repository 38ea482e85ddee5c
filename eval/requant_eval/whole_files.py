"""The only place that writes: files whole or absent, through no link, on the disk.

A file is written under a name that nobody can guess, in its own directory, synced, and renamed; then the directory is
synced. A link that stands in the file's place is replaced, never followed. Files that grow (logs) and files that are
filled in place (shards) are opened so that a link is refused. Raises OSError with the file's name.

A writer locks its temporary file: what a killed process left behind is told from what another one still writes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom, FileIO
from pathlib import Path
from typing import BinaryIO, Literal

from requant_eval.regular_files import open_regular

TEMPORARY = ".*.tmp"  # glob of the temporary names
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_KEPT = 40  # characters of a file's name in its temporary name
_COPIED = 2**24  # bytes at a time
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of file systems that cannot sync a directory

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def whole_file(file: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """Give an open file to fill; at the end of the block it takes the place of `file`, on the disk.

    After an error `file` is as it was and the temporary one is removed.
    size: bytes that will be written, where they are known, for the message of a full disk.
    """
    temporary, handle = _temporary(file)
    try:
        with _named(file, size):
            yield handle
            sync(handle)
            handle.close()
            os.replace(temporary, file)
    except BaseException:
        handle.raw.close()  # without a flush, which would fail again
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(file.parent)


def write(file: Path, data: bytes) -> None:
    """Write a file at once: readers see the old content or the new one, never a part."""
    with whole_file(file, len(data)) as handle:
        handle.write(data)


def write_new(file: Path, data: bytes) -> None:
    """Write a file that must not exist: FileExistsError where anything has its name."""
    temporary, handle = _temporary(file)
    try:
        with _named(file, len(data)):
            handle.write(data)
            sync(handle)
            os.link(temporary, file, follow_symlinks=False)  # unlike a rename it never replaces
    finally:
        handle.raw.close()
        temporary.unlink(missing_ok=True)
    sync_directory(file.parent)


def copy(content: BinaryIO, file: Path) -> None:
    """Copy what an open file holds."""
    with whole_file(file, os.fstat(content.fileno()).st_size) as handle:
        shutil.copyfileobj(content, handle, _COPIED)


def link(source: Path, file: Path) -> bool:
    """Give a regular file a second name; False where its file system has none, or the two are on different ones.

    FileExistsError where anything has the name.
    """
    if not stat.S_ISREG(source.lstat().st_mode):
        return False
    try:
        os.link(source, file, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return False
    sync_directory(file.parent)
    return True


def append(file: Path, text: str) -> None:
    """Add text to a file that grows, made where it is missing."""
    data = memoryview(text.encode("utf-8", "backslashreplace"))
    with _named(file), open_to_append(file) as handle:
        while data:
            data = data[handle.write(data) :]


def open_to_append(file: Path) -> FileIO:
    """A file that grows, open at its end; OSError for a link and whatever else is no regular file."""
    return _open(file, "ab", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def open_in_place(file: Path) -> FileIO:
    """A file that exists, open to change parts of it; OSError for a link, or a file that has a second name."""
    handle = _open(file, "r+b", os.O_RDWR)
    if os.fstat(handle.fileno()).st_nlink > 1:
        handle.close()
        raise OSError(errno.EMLINK, "has a second name (hard link): not changed in place", str(file))
    return handle


def create(file: Path) -> FileIO:
    """A new file under its final name, open to be filled in any order; what has the name is removed."""
    with suppress(FileNotFoundError):
        file.unlink()
    return open(file, "r+b", buffering=0, opener=lambda path, _: os.open(path, _NEW, 0o666))


def _open(file: Path, mode: Literal["ab", "r+b"], flags: int) -> FileIO:
    """A regular file, through no link."""
    refuse_link(file)
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: a pipe would wait for its reader
    handle = open(file, mode, buffering=0, opener=lambda path, _: os.open(path, flags, 0o666))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        return handle
    handle.close()
    raise OSError(errno.EINVAL, "is no regular file", str(file))


def make_directory(path: Path, *, durable: bool = True) -> Path:
    """Make a directory and those above it, each on the disk; an existing one stays, a link in its place is refused.

    Links above it are followed: where a run goes is its owner's choice.
    """
    if not path.exists() and not path.is_symlink():
        if not path.parent.exists():
            make_directory(path.parent, durable=durable)
        with suppress(FileExistsError):
            path.mkdir()
        if durable:
            sync_directory(path.parent)
    refuse_link(path)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return path


def refuse_link(path: Path) -> None:
    """Raise OSError where `path` is a symbolic link."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"is a link to {os.readlink(path)}: nothing is written through links", str(path))


def move(source: Path, target: Path) -> None:
    """Rename, and sync the directory (both must be in the same one)."""
    source.rename(target)
    sync_directory(target.parent)


def remove(path: Path) -> None:
    """Remove a file or a directory with all in it; of a link, the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def sync(handle: BinaryIO | FileIO) -> None:
    """Wait until what was written to an open file is on the disk."""
    handle.flush()
    getattr(os, "fdatasync", os.fsync)(handle.fileno())


def sync_file(file: Path) -> None:
    """Wait until a file that others wrote is on the disk."""
    with _named(file), open_regular(file) as handle:
        os.fsync(handle.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk, where its file system can."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def sweep(directory: Path, name: str = "") -> None:
    """Remove temporary files that killed processes left in a directory.

    name: of one file, whose temporary files alone are removed.
    """
    start = f".{name[:_KEPT]}." if name else "."
    with os.scandir(directory) as entries:
        stale = [e for e in entries if e.name.startswith(start) and e.name.endswith(".tmp")]
    for entry in stale:
        if not entry.is_file(follow_symlinks=False):
            if entry.is_symlink():
                os.unlink(entry.path)
        elif not _locked(entry.path):
            with suppress(FileNotFoundError):
                os.unlink(entry.path)


def _temporary(file: Path) -> tuple[Path, BufferedRandom]:
    """(path, open file) of a new temporary file beside `file`, locked; older ones of dead processes are removed."""
    with _named(file):
        with suppress(OSError):
            sweep(file.parent, file.name)
        while True:
            temporary = file.parent / f".{file.name[:_KEPT]}.{secrets.token_hex(8)}.tmp"
            handle = os.fdopen(os.open(temporary, _NEW, 0o666), "w+b")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # somebody sweeps, and has just taken it for a dead one's
                handle.close()
                continue
            except OSError:
                pass  # a file system without locks: nothing is swept there either
            return temporary, handle


def _locked(path: str) -> bool:
    """Whether the writer of a temporary file is alive, or that cannot be known."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _named(file: Path, size: int | None = None) -> Iterator[None]:
    """Name the file in an OSError that names none, or the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and not str(error.filename).endswith(".tmp")):
            raise
        named = OSError(error.errno, error.strerror, str(file))  # of the subclass that belongs to the number
        named.needed = size  # type: ignore[attr-defined]
        raise named from error


def reason(error: OSError, file: Path, size: int | None = None) -> str:
    """Why a write failed; of a full disk with what is free and, where it is known, needed.

    size: bytes to be written. file: says which file system it is.
    """
    text = error.strerror or str(error)
    size = getattr(error, "needed", None) if size is None else size
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return text
    needs = "" if size is None else f"{bytes_text(size)} needed"
    free = "" if error.errno == errno.EDQUOT else f"{bytes_text(free_bytes(file))} free"
    figures = ", ".join(filter(None, (needs, free)))
    return f"{text}{figures and f': {figures}'}; free space and run again"


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where `path` is or will be."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    found = os.statvfs(existing)
    return found.f_bavail * found.f_frsize


def bytes_text(count: int) -> str:
    """Decimal units, three significant digits: 123456789 -> "123 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{count} B"

"""A layer between a command and the kernel: writes, syncs, renames, seen and refused.

The command installs a seccomp filter (`enter`) that hands these calls to the campaign (`Layer`), which reads their arguments
from the command's memory, then lets the kernel go on or answers with an error. Needs no rights, no tool and no compiler:
Linux 5.5 or newer on x86-64. Calls that only read pass untouched. sendfile and copy_file_range do not exist
here, so that copies become writes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SYSCALLS = {
    1: "write", 18: "pwrite64", 20: "writev", 296: "pwritev", 2: "open", 85: "creat", 257: "openat", 76: "truncate",
    77: "ftruncate",
    285: "fallocate", 82: "rename", 264: "renameat", 316: "renameat2", 86: "link", 265: "linkat", 87: "unlink",
    263: "unlinkat",
    83: "mkdir", 258: "mkdirat", 84: "rmdir", 88: "symlink", 266: "symlinkat", 74: "fsync", 75: "fdatasync",
}  # fmt: skip
ABSENT = (40, 326)  # sendfile, copy_file_range
FLAGS_OF = {"open": 24, "openat": 32}  # byte offset of the flags in seccomp_data
GROWING = frozenset({"write", "pwrite64", "writev", "pwritev", "fallocate", "ftruncate", "truncate"})
NEW_LISTENER, SET_FILTER, NO_NEW_PRIVILEGES, SECCOMP = 8, 1, 38, 317
RECEIVE, SEND, CONTINUE = 0xC0502100, 0xC0182101, 1
ALLOW, NOTIFY, ERROR = 0x7FFF0000, 0x7FC00000, 0x00050000
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
AT_CWD, UNLINK_DIRECTORY, APPEND = -100, 0x200, 0o2000


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call on a file below the watched directory. path: absolute; other: what is renamed or linked to `path`."""

    number: int
    name: str
    path: str
    other: str = ""
    offset: int = 0
    data: bytes = b""
    size: int = 0  # of truncate and fallocate; 1 for opening with O_TRUNC
    process: int = 0


Decide = Callable[[Call], int]  # an errno that refuses the call, 0, or DYING
DYING = -1  # no answer: the command was killed, and must not get as far as the call


def usable() -> bool:
    """Whether this machine has what the layer needs."""
    release = tuple(int(n) for n in platform.release().split("-")[0].split(".")[:2])
    return platform.machine() == "x86_64" and platform.system() == "Linux" and release >= (5, 5)


def _program() -> bytes:
    """The filter: notify for SYSCALLS, of opens only those that may create or write."""

    def step(code: int, yes: int, no: int, value: int) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    made = [step(LOAD, 0, 0, 0)]
    for number, name in SYSCALLS.items():
        if name in FLAGS_OF:
            made += [step(EQUAL, 0, 4, number), step(LOAD, 0, 0, FLAGS_OF[name])]
            made += [step(ANY_BIT, 0, 1, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)]
            made += [step(RETURN, 0, 0, NOTIFY), step(RETURN, 0, 0, ALLOW)]
        else:
            made += [step(EQUAL, 0, 1, number), step(RETURN, 0, 0, NOTIFY)]
    for number in ABSENT:
        made += [step(EQUAL, 0, 1, number), step(RETURN, 0, 0, ERROR | errno.ENOSYS)]
    return b"".join((*made, step(RETURN, 0, 0, ALLOW)))


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("program", ctypes.c_char_p))


def enter(address: str) -> None:
    """Install the filter in this process and hand its listener to the `Layer` at a socket's address."""
    code = _program()
    libc = ctypes.CDLL(None, use_errno=True)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        listener = libc.syscall(SECCOMP, SET_FILTER, NEW_LISTENER, ctypes.byref(_Filter(len(code) // 8, code)))
        if listener < 0:
            raise OSError(ctypes.get_errno(), "no seccomp listener")
        socket.send_fds(connection, [b"x"], [listener])
    os.close(listener)


class Layer:
    """The campaign's side. decide: called for every call below `root`; an errno refuses it, 0 lets it pass.

    `address` goes into the job of the command. One layer, one command.
    """

    def __init__(self, root: Path, socket_file: Path, decide: Decide) -> None:
        self.root, self.decide, self.calls = str(root), decide, 0
        self.error: BaseException | None = None
        socket_file.unlink(missing_ok=True)
        self.address = str(socket_file)
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(self.address)
        self.server.listen(1)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Wait until the command has ended; raise what went wrong here."""
        self.thread.join(10)
        self.server.close()
        if self.error is not None:
            raise self.error

    def _serve(self) -> None:
        try:
            connection, _ = self.server.accept()
            _, (listener,), _, _ = socket.recv_fds(connection, 1, 1)
            connection.close()
            poll = select.poll()
            poll.register(listener, select.POLLIN)
            while all(not events & select.POLLHUP for _, events in poll.poll()):
                self._answer(listener)
            os.close(listener)
        except BaseException as error:  # noqa: BLE001 - raised again in `close`
            self.error = error

    def _answer(self, listener: int) -> None:
        notice = bytearray(80)
        try:
            fcntl.ioctl(listener, RECEIVE, notice)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return  # killed meanwhile
            raise
        identity, process, _, number = struct.unpack_from("QIIi", notice)
        arguments = struct.unpack_from("6Q", notice, 32)
        refused = 0
        with suppress(FileNotFoundError, ProcessLookupError):
            call = self._read(process, SYSCALLS[number], arguments)
            refused = self.decide(call) if call else 0
        if refused == DYING:
            return
        with suppress(FileNotFoundError):  # the process is gone
            answer = struct.pack("QqiI", identity, 0, -refused, 0 if refused else CONTINUE)
            fcntl.ioctl(listener, SEND, answer)

    def _read(self, process: int, name: str, arguments: tuple[int, ...]) -> Call | None:
        """The call with its paths and bytes; None for what is not below the root."""
        read = READERS[name](process, arguments)
        if read is None or not any(p.startswith(self.root) for p in (read.path, read.other)):
            return None
        self.calls += 1
        return Call(**{**read.__dict__, "number": self.calls, "name": name, "process": process})


# --- arguments, out of the command's memory ---


def _memory(process: int, address: int, size: int) -> bytes:
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(size)


def _text(process: int, address: int) -> str:
    made = b""
    while b"\0" not in made:
        made += _memory(process, address + len(made), 4096 - (address + len(made)) % 4096)
    return os.fsdecode(made[: made.index(b"\0")])


def _open_path(process: int, descriptor: int) -> str:
    return os.readlink(f"/proc/{process}/fd/{descriptor}").removesuffix(" (deleted)")


def _path(process: int, directory: int, address: int) -> str:
    """An absolute path whose directory is resolved, as the kernel would; the last part may be a link."""
    text = _text(process, address)
    number = ctypes.c_int(directory).value
    start = os.readlink(f"/proc/{process}/cwd") if number == AT_CWD else _open_path(process, number)
    whole = os.path.join(start, text)
    return os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))


def _made(path: str, other: str = "", **values: int | bytes) -> Call:
    return Call(number=0, name="", path=path, other=other, **values)  # type: ignore[arg-type]


def _opened(process: int, directory: int, address: int, flags: int) -> Call:
    path = _path(process, directory, address)
    return _made(
        os.path.realpath(path) if not flags & os.O_NOFOLLOW else path, size=int(bool(flags & os.O_TRUNC)), offset=flags
    )


def _written(process: int, descriptor: int, data: Callable[[], bytes], offset: int | None) -> Call | None:
    path = _open_path(process, descriptor)
    if not path.startswith("/") or not os.path.isfile(path):
        return None
    if offset is None:
        lines = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{process}/fdinfo/{descriptor}").read_text().splitlines()[:2]
        )
        offset = os.path.getsize(path) if int(lines["flags"], 8) & APPEND else int(lines["pos"])
    return _made(path, offset=offset, data=data())


def _gathered(process: int, address: int, count: int) -> bytes:
    parts = struct.iter_unpack("QQ", _memory(process, address, 16 * count))
    return b"".join(_memory(process, start, size) for start, size in parts)


CWD = AT_CWD & 0xFFFFFFFF
READERS: dict[str, Callable[[int, tuple[int, ...]], Call | None]] = {
    "write": lambda p, a: _written(p, a[0], lambda: _memory(p, a[1], a[2]), None),
    "pwrite64": lambda p, a: _written(p, a[0], lambda: _memory(p, a[1], a[2]), a[3]),
    "writev": lambda p, a: _written(p, a[0], lambda: _gathered(p, a[1], a[2]), None),
    "pwritev": lambda p, a: _written(p, a[0], lambda: _gathered(p, a[1], a[2]), a[3]),
    "open": lambda p, a: _opened(p, CWD, a[0], a[1]),
    "creat": lambda p, a: _opened(p, CWD, a[0], os.O_CREAT | os.O_TRUNC),
    "openat": lambda p, a: _opened(p, a[0], a[1], a[2]),
    "truncate": lambda p, a: _made(_path(p, CWD, a[0]), size=a[1]),
    "ftruncate": lambda p, a: _made(_open_path(p, a[0]), size=a[1]),
    "fallocate": lambda p, a: _made(_open_path(p, a[0]), size=a[2] + a[3]),
    "rename": lambda p, a: _made(_path(p, CWD, a[1]), _path(p, CWD, a[0])),
    "renameat": lambda p, a: _made(_path(p, a[2], a[3]), _path(p, a[0], a[1])),
    "renameat2": lambda p, a: _made(_path(p, a[2], a[3]), _path(p, a[0], a[1])),
    "link": lambda p, a: _made(_path(p, CWD, a[1]), _path(p, CWD, a[0])),
    "linkat": lambda p, a: _made(_path(p, a[2], a[3]), _path(p, a[0], a[1])),
    "unlink": lambda p, a: _made(_path(p, CWD, a[0])),
    "unlinkat": lambda p, a: _made(_path(p, a[0], a[1]), size=a[2] & UNLINK_DIRECTORY),
    "mkdir": lambda p, a: _made(_path(p, CWD, a[0])),
    "mkdirat": lambda p, a: _made(_path(p, a[0], a[1])),
    "rmdir": lambda p, a: _made(_path(p, CWD, a[0])),
    "symlink": lambda p, a: _made(_path(p, CWD, a[1])),
    "symlinkat": lambda p, a: _made(_path(p, a[1], a[2])),
    "fsync": lambda p, a: _made(_open_path(p, a[0])),
    "fdatasync": lambda p, a: _made(_open_path(p, a[0])),
}


def kill_at(number: int) -> Decide:
    """A `decide` that kills the command before its n-th call."""

    def decide(call: Call) -> int:
        if call.number == number:
            with suppress(ProcessLookupError):
                os.kill(call.process, signal.SIGKILL)  # a thread's id: the whole process dies
            return DYING
        return 0

    return decide


def full_after(nbytes: int) -> Decide:
    """A `decide` for a disk on which so many bytes are free: whatever needs more fails with ENOSPC."""
    used = 0

    def decide(call: Call) -> int:
        nonlocal used
        if call.name in GROWING:
            used += len(call.data) or (call.size if call.name == "fallocate" else 0)
            if used > nbytes:
                return errno.ENOSPC
        return 0

    return decide


def failing_at(number: int, code: int) -> Decide:
    """A `decide` for a disk whose n-th call fails with this errno, once."""
    return lambda call: code if call.number == number else 0

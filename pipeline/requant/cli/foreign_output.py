"""Output of libraries, kept apart from ours: banners, bars and notices go to the run's log.

Both descriptors are redirected, so also what native code writes is caught. What matters to a user is said by us.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TextIO

from requant.errors import RequantError
from requant.outgoing import masked, masked_stream, shared
from requant.runtime.library_imports import importing
from requant_eval import whole_files
from requant_eval.escaping import visible

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-_]")
_LAST_LINES = 40  # of a library's output, shown with an error that is not ours


def own_stderr() -> IO[str]:
    """The terminal's or file's stderr, which stays ours while `quiet` redirects the descriptor."""
    if getattr(sys.stderr, "stream", sys.stderr) is not sys.__stderr__:
        return sys.stderr  # somebody collects it, such as a test
    return masked_stream(os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace", buffering=1))


def readable(raw: bytes) -> list[str]:
    """The lines of an output, without secrets, escapes and the states of a bar that were written over."""
    text = _ESCAPE.sub("", raw.decode("utf-8", "replace")).replace("\r\n", "\n")
    lines = (line.rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return [visible(masked(line)) for line in lines if line]


@contextlib.contextmanager
def quiet(log: Path | None = None) -> Iterator[None]:
    """Keep the output of libraries off stdout and stderr; it is appended to `log` where that file exists.

    An error that is not ours shows its last lines, since they may say what happened. Of several processes each keeps
    its descriptors, so that the launcher shows how one of them died.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            stack.enter_context(_redirected(log))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        _silence_loggers()
        yield


def _silence_loggers() -> None:
    with importing():
        from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@functools.cache
def _catcher() -> tuple[IO[bytes], TextIO]:
    """The temporary file of this process, and a text stream on it that libraries' handlers may keep."""
    file = tempfile.NamedTemporaryFile(prefix="requant-libraries-", suffix=".log")  # noqa: SIM115 - until exit
    return file, os.fdopen(os.dup(file.fileno()), "w", encoding="utf-8", errors="replace", buffering=1)


@contextlib.contextmanager
def _redirected(log: Path | None) -> Iterator[None]:
    """Descriptors 1 and 2 and Python's streams, redirected to a temporary file."""
    caught, sink = _catcher()
    begin = caught.seek(0, os.SEEK_END)
    try:
        with _streams_to(caught.fileno(), sink):
            yield
    except (RequantError, OSError, KeyboardInterrupt, SystemExit):
        _keep(caught, begin, log)
        raise
    except BaseException:
        print(*_keep(caught, begin, log)[-_LAST_LINES:], sep="\n", file=sys.stderr)
        raise
    _keep(caught, begin, log)


@contextlib.contextmanager
def _streams_to(descriptor: int, sink: TextIO) -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    for stream in streams:
        stream.flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    with _crashes_to(saved[2]):
        try:
            for number in saved:
                os.dup2(descriptor, number)
            sys.stdout = sys.stderr = sink
            yield
        finally:
            for stream in (*streams, sink):
                stream.flush()
            sys.stdout, sys.stderr = streams
            for number, was in saved.items():
                os.dup2(was, number)
    for was in saved.values():
        os.close(was)


def _keep(caught: IO[bytes], begin: int, log: Path | None) -> list[str]:
    """Append what was caught from `begin` on to the log; its lines."""
    caught.seek(begin)
    lines = readable(caught.read())
    if lines and log is not None and log.is_file():
        with contextlib.suppress(OSError):  # a log that cannot be written stops nothing
            whole_files.append(log, "".join(f"printed by a library: {shared(line)}\n" for line in lines))
    return lines


@contextlib.contextmanager
def _crashes_to(descriptor: int) -> Iterator[None]:
    """A crash of native code writes Python's stack to `descriptor`, unless another handler is installed."""
    if faulthandler.is_enabled():
        yield
        return
    faulthandler.enable(descriptor)
    try:
        yield
    finally:
        faulthandler.disable()

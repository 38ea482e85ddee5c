"""A stranger's program, such as a chat template, in a process of its own with limits.

What it computes comes back through a pipe while it goes on. Nothing else holds what a template can do in one step:
`'a' * 10**10`, `10**10**10`, `'%1000000000d' % 1`, loops in loops. The kernel ends a process that exceeds its limits.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import re
import resource
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

MEMORY = 512 * 2**20  # bytes beyond what this process has mapped
SECONDS = 2.0  # of the CPU; and for each item, so that long conversations have their time
SECONDS_AN_ITEM = 0.5
_OUT_OF_MEMORY = 71  # exit code

T = TypeVar("T")
R = TypeVar("R")


class LimitError(Exception):
    """The program exceeded its limits or crashed; the message says which, as in "takes more than 512 MB of memory"."""


def guarded(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """function(item) of every item in order, computed ahead in a forked process.

    The function may use the CPU for SECONDS, and for each item SECONDS_AN_ITEM more, and MEMORY more bytes than this
    process. It changes nothing here. Its exceptions are raised here; LimitError when it exceeds a limit or crashes.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        _work(writing, function, items)
    os.close(writing)
    ended = False
    try:
        with os.fdopen(reading, "rb") as pipe:
            for _ in items:
                try:
                    raised, value = pickle.load(pipe)
                except (EOFError, pickle.UnpicklingError):
                    ended = True
                    raise LimitError(_reason(os.waitpid(pid, 0)[1])) from None
                if raised:
                    raise value
                yield value
    finally:
        if not ended:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def call_guarded(function: Callable[[], R]) -> R:
    """function() within the limits of `guarded`; raises as it does."""
    (result,) = guarded(lambda call: call(), [function])
    return result


def matches_in_time(pattern: str, names: Collection[str]) -> bool:
    """Whether a stranger's regular expression is through with every name within the limits.

    An expression with a repetition in a repetition, or with many, may take longer than anybody waits; others are not
    tried. A name is tried with an end that hardly any expression matches too: then all ways are tried.
    """
    if not re.search(r"\)[*+{]", pattern) and len(re.findall(r"[*+}]", pattern)) < 4:
        return True
    compiled = re.compile(rf"(.*\.)?({pattern})$")
    try:
        call_guarded(lambda: [bool(compiled.match(name + end)) for name in names for end in ("", "\n!")])
    except LimitError:
        return False
    return True


def _work(writing: int, function: Callable[[T], R], items: Sequence[T]) -> NoReturn:
    """The forked process: results to the pipe, then the end, without anything that belongs to its parent."""
    code = 1
    try:
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGPROF):
            signal.signal(kind, signal.SIG_IGN if kind == signal.SIGINT else signal.SIG_DFL)
        faulthandler.disable()  # the parent tells of a crash
        gc.freeze()  # the parent's objects stay in shared pages
        _limit_memory()
        started = time.process_time()
        with os.fdopen(writing, "wb") as pipe:
            for number, item in enumerate(items):
                allowed = SECONDS + SECONDS_AN_ITEM * number - (time.process_time() - started)
                signal.setitimer(signal.ITIMER_PROF, max(allowed, 0.001))
                _send(pipe, function, item)
        code = 0
    except MemoryError:
        code = _OUT_OF_MEMORY
    except BaseException:  # noqa: BLE001  # a parent that is gone; nothing may go on from here as its parent would
        pass
    finally:
        os._exit(code)


def _send(pipe: Any, function: Callable[[T], R], item: T) -> None:
    """One result or exception, at once."""
    try:
        answer = pickle.dumps((False, function(item)))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # raised again by the parent
        answer = _dumped(error)
    pipe.write(answer)
    pipe.flush()


def _dumped(error: Exception) -> bytes:
    """An exception for the parent; one that cannot be sent as it is becomes a RuntimeError with its text."""
    try:
        answer = pickle.dumps((True, error))
        pickle.loads(answer)
    except Exception:  # noqa: BLE001  # an exception's class may do what it likes
        return pickle.dumps((True, RuntimeError(f"{type(error).__name__}: {error}")))
    return answer


def _limit_memory() -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = mapped + MEMORY if hard == resource.RLIM_INFINITY else min(mapped + MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _reason(status: int) -> str:
    """What ended the process, from its wait status."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGPROF:
        return f"runs without an end (more than {SECONDS:g} s)"
    if code == _OUT_OF_MEMORY:
        return f"takes more than {MEMORY // 2**20} MB of memory"
    return f"crashes ({signal.Signals(-code).name})" if code < 0 else "ends before it is done"

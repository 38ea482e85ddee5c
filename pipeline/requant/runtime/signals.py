"""SIGTERM and SIGHUP as Ctrl-C: one line and the exit code 128 + signal end a command."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

RESUMES = "the same command resumes the run"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_arrived: list[int] = []  # signals that were raised as exceptions


class Terminated(KeyboardInterrupt):
    """A signal of `ENDING` arrived; passes wherever Ctrl-C does. number: of the signal."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def end_at_once() -> None:
    """End the process with one line on SIGINT, SIGTERM and SIGHUP: while it imports, and after its command.

    An exception there would pass through imports and exit handlers, which print tracebacks. A signal that is ignored,
    as nohup wants it, or has a foreign handler stays as it is.
    """
    for number in ENDING:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, _raise):
            signal.signal(number, _end)


def raise_on_termination() -> None:
    """Raise `Terminated` in the main thread on SIGINT, SIGTERM and SIGHUP.

    A signal that is ignored, as nohup wants it, or has a foreign handler stays as it is.
    """
    _arrived.clear()
    for number in ENDING:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, _end):
            signal.signal(number, _raise)


def _end(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, f"{word(number)}\n".encode())
    os._exit(exit_code(number))


def _raise(number: int, frame: FrameType | None) -> None:
    _arrived.append(number)
    raise Terminated(number)


def arrived() -> Terminated | None:
    """The last signal that was raised, also where a library has made another exception of it."""
    return Terminated(_arrived[-1]) if _arrived else None


def exit_code(number: int) -> int:
    """128 + the signal's number, as a shell reports it."""
    return 128 + number


def number_of(error: KeyboardInterrupt) -> int:
    """The signal behind an interrupt."""
    return error.number if isinstance(error, Terminated) else signal.SIGINT


def word(number: int) -> str:
    """interrupted, or terminated with the signal's name."""
    return "interrupted" if number == signal.SIGINT else f"terminated ({signal.Signals(number).name})"


def watch(on_signal: Callable[[int], None]) -> None:
    """Call `on_signal` in a thread when a signal that ends this process arrives.

    Also while the main thread is inside of a library's call, where Python's handlers wait for its end.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)

    def read() -> None:
        while True:
            for number in os.read(readable, 64):
                if number in ENDING:
                    on_signal(number)

    threading.Thread(target=read, daemon=True).start()

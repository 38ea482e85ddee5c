"""Progress of a run on stderr: a row a stage on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from requant.cli.foreign_output import own_stderr
from requant.outgoing import masked
from requant_eval.escaping import one_line

if TYPE_CHECKING:
    from requant.run.observer import Watcher
else:
    Watcher = object  # its package imports torch, and the first row is shown before that

PLAIN_EVERY = 15.0  # seconds between plain lines, also where nothing is counted
BAR = 16  # characters
UNITS = {"merge": "tensors", "quantize": "blocks", "evaluate": "windows", "suggest": "measurements", "convert": "steps"}
"""What the steps of a stage are; the notes of heal name theirs, which depend on how it heals."""


@dataclass
class StageRow:
    """One stage on the console. note: what it does now; seconds are of `time.monotonic`.

    first: when the first step was told, and how many there were then.
    """

    name: str
    started: float
    ended: float | None = None
    up_to_date: bool = False
    done: int = 0
    total: int = 0
    note: str = ""
    first: tuple[float, int] | None = None

    def told(self, done: int, total: int, note: str, now: float) -> None:
        """Take what a stage says of its steps."""
        if total != self.total:
            self.first = None  # other steps, which may begin with none done
        if done and self.first is None:
            self.first = (now, done)
        self.done, self.total, self.note = done, total, note

    def count(self) -> str:
        """Steps with their unit."""
        return f"{self.done}/{self.total} {UNITS.get(self.name, '')}".rstrip() if self.total else ""

    def left(self, now: float) -> float | None:
        """Estimate of the seconds left; None before some steps after the first, and after the last.

        The first step has what a stage does once: a model is loaded, kernels are compiled.
        """
        if self.first is None or not 0 < self.done < self.total:
            return None
        since, before = self.first
        steps = self.done - before
        return (now - since) / steps * (self.total - self.done) if steps >= max(2, self.total // 20) else None

    def bar(self, now: float) -> str:
        """The steps as a bar; a mark that moves where nothing is counted."""
        if self.up_to_date or (self.ended is not None and not self.total):
            return "━" * BAR
        if not self.total:
            at = int(now * 4) % BAR
            return "─" * at + "━" + "─" * (BAR - 1 - at)
        full = BAR * min(self.done, self.total) // self.total
        return "━" * full + "─" * (BAR - full)

    def line(self, now: float, width: int) -> str:
        """The row in at most `width` characters; the clock of a finished stage has stopped."""
        if self.up_to_date:
            return f"{self.name:<8} {self.bar(now)} up to date"[:width]
        left = self.left(now) if self.ended is None else None
        parts = [
            self.count(),
            clock((now if self.ended is None else self.ended) - self.started),
            f"{clock(left)} left" if left is not None else "",
            self.note,
        ]
        text = f"{self.name:<8} {self.bar(now)} " + "  ".join(part for part in parts if part)
        return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def clock(seconds: float) -> str:
    """Seconds as 0:42 or 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ConsoleWatcher(Watcher):
    """Shows stages and progress on stderr; use as a context manager, outside of `quiet`.

    On a terminal the rows are drawn again four times a second. Elsewhere a line is printed at least every
    `PLAIN_EVERY` seconds.
    """

    def __init__(self) -> None:
        self.stream = own_stderr()
        self.rows: list[StageRow] = []
        self.printed = time.monotonic()
        self.stopped = threading.Event()
        self.live: Any = None
        self.console: Any = None
        if self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self.console = Console(file=self.stream, highlight=False)
            self.live = Live(
                get_renderable=self._drawn,
                console=self.console,
                refresh_per_second=4,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def __enter__(self) -> ConsoleWatcher:
        if self.live:
            self.live.start()
        else:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stopped.set()
        self._end(stopped=error is not None)
        if self.live:
            self.live.stop()
        if self.stream is not sys.stderr:
            with suppress(OSError):
                self.stream.close()

    def stage(self, name: str, *, done: bool) -> None:
        self._end()
        self.rows.append(StageRow(name, time.monotonic(), up_to_date=done))
        if not self.live:
            self._print(f"{name}: {'up to date' if done else 'started'}")

    def doing(self, text: str) -> None:
        if self.rows:
            self.rows[-1].note = _shown(text)

    def warn(self, text: str) -> None:
        text = _shown(text)
        if self.live:
            self.console.print(f"warning: {text}", markup=False)
        else:
            self._print(f"warning: {text}")

    def progress(self, done: int, total: int, note: str = "") -> None:
        row = self.rows[-1]
        now = time.monotonic()
        row.told(done, total, _shown(note), now)
        if not self.live and (now - self.printed >= PLAIN_EVERY or done == total):
            self._print(_plain(row, now))

    def _end(self, *, stopped: bool = False) -> None:
        """Stop the clock of the stage that ran last."""
        if self.rows and self.rows[-1].ended is None:
            row = self.rows[-1]
            row.ended = time.monotonic()
            row.note = "stopped" if stopped else ""

    def _print(self, text: str) -> None:
        self.printed = time.monotonic()
        with suppress(OSError):  # progress that nobody can read stops no run
            print(text, file=self.stream, flush=True)

    def _beat(self) -> None:
        """Print the state of a stage that has said nothing for PLAIN_EVERY seconds."""
        while not self.stopped.wait(min(1.0, PLAIN_EVERY / 2)):
            now = time.monotonic()
            if self.rows and self.rows[-1].ended is None and now - self.printed >= PLAIN_EVERY:
                self._print(_plain(self.rows[-1], now))

    def _drawn(self) -> Any:
        from rich.text import Text

        now, width = time.monotonic(), self.console.width
        return Text("\n".join(row.line(now, width) for row in self.rows), no_wrap=True, overflow="crop")


def _shown(text: str) -> str:
    """On one line, without secrets, before anything is cut off."""
    return one_line(masked(text))


def _plain(row: StageRow, now: float) -> str:
    """One line about a running stage, for a file."""
    left = row.left(now)
    ago = f"{now - row.started:.0f} s" + (f", about {left:.0f} s left" if left is not None else "")
    what = " ".join(part for part in (row.count(), row.note) if part) or "working"
    return f"{row.name}: {what} ({ago})"

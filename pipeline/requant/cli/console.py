"""Progress of a run on stderr: bars with an ETA on a terminal, plain lines otherwise."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from requant.run.observer import Watcher

PLAIN_EVERY = 15.0  # seconds between plain lines


class ConsoleWatcher(Watcher):
    """Shows stages and progress on stderr; use as a context manager."""

    def __init__(self) -> None:
        self.name, self.started, self.printed = "", time.monotonic(), 0.0
        self.bar: Any = None
        self.task: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self.bar = Progress(
                TextColumn("{task.description:10}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )

    def __enter__(self) -> ConsoleWatcher:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def stage(self, name: str, *, done: bool) -> None:
        self.name, self.started, self.printed = name, time.monotonic(), time.monotonic()
        if self.bar:
            self.task = self.bar.add_task(
                name, total=1 if done else None, completed=int(done), note="up to date" if done else ""
            )
        else:
            print(f"{name}: {'up to date' if done else 'started'}", file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(f"warning: {text}", markup=False)
        else:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def progress(self, done: int, total: int, note: str = "") -> None:
        if self.bar:
            self.bar.update(self.task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if now - self.printed >= PLAIN_EVERY or done == total:
            self.printed = now
            left = (now - self.started) / done * (total - done)
            print(
                f"{self.name}: {done}/{total} {note} ({now - self.started:.0f} s, about {left:.0f} s left)",
                file=sys.stderr,
                flush=True,
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and notices of libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

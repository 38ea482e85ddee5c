"""`Watcher`, which a run reports its progress to, and `Outcome`, what it leaves."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from requant_eval.report.records import Report

log = logging.getLogger(__name__)


class Watcher:
    """Receives the progress of a run. The CLI shows it; this base class is silent."""

    def stage(self, name: str, *, done: bool) -> None:
        """A stage begins; `done` when there is nothing to do for it."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Steps of the current stage."""

    def doing(self, text: str) -> None:
        """What the current stage does now, where no steps are counted: loads a model, verifies."""

    def warn(self, text: str) -> None:
        """Something a user should know before the long work ends."""


class LoggedWatcher(Watcher):
    """Passes everything on to another watcher, and logs what a stage does where no steps are counted."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def stage(self, name: str, *, done: bool) -> None:
        self.watcher.stage(name, done=done)

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.watcher.progress(done, total, note)

    def doing(self, text: str) -> None:
        log.info("%s", text)
        self.watcher.doing(text)

    def warn(self, text: str) -> None:
        self.watcher.warn(text)


@dataclass
class Outcome:
    """Result of a run: directory, stages that were not skipped, report if it was reached."""

    path: Path
    ran: list[str] = field(default_factory=list)
    report: Report | None = None

"""What a run tells while it goes, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Watcher:
    """What is told how a run goes; the CLI shows it. This one is silent."""

    def stage(self, name: str, done: bool) -> None:
        """A stage begins; `done` when there is nothing to do for it."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Steps of the current stage."""

    def warn(self, text: str) -> None:
        """Something a user should know before the long work ends."""


@dataclass
class Outcome:
    """What a run left: its directory, the stages that were really run, the report if it got that far."""

    path: Path
    ran: list[str] = field(default_factory=list)
    report: dict[str, Any] | None = None

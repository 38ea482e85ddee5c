"""Stage track of a run: the finished report, sent to the trackers of `output.track`."""

from __future__ import annotations

import logging
from typing import Any

from requant.checkpoint.atomic_write import make_directory
from requant.checkpoint.run_directory import key_of
from requant.run.context import RunContext
from requant.run.report_stage import load_report, report_key
from requant.tracking import trackers

log = logging.getLogger(__name__)
FOLDER = "tracking"
ARTIFACTS = ("report.html", "report.json")


def track_key(context: RunContext) -> str:
    """Digest of all that the report is made of, and of the trackers."""
    return key_of(report_key(context), context.recipe.name, context.recipe.output.track)


def is_tracked(context: RunContext, key: str) -> bool:
    """Whether this report was sent to every tracker."""
    stored = context.directory.result("track", key)
    return stored is not None and not stored["failed"]


def run_track(context: RunContext, key: str) -> dict[str, Any]:
    """Send the report; a tracker that fails is a warning.

    Returns which were sent to, and why others were not; these are tried again by the next run.
    """
    if context.outcome.report is None:
        load_report(context)
    report, run = context.outcome.report, context.directory.path
    assert report is not None
    folder = make_directory(run / FOLDER)
    stored = context.directory.result("track", key) or {"sent": []}
    sent, failed = list(stored["sent"]), {}
    for name in (n for n in context.recipe.output.track if n not in sent):
        context.watcher.doing(f"sending the report to {name}")
        why = trackers.send(name, report, [run / file for file in ARTIFACTS], folder.absolute())
        if why is None:
            sent.append(name)
        else:
            failed[name] = why
            context.watcher.warn(f"output.track: {name}: not sent ({why}): the next run of the recipe tries it again")
    log.info("track: sent to %s", ", ".join(sent) or "none")
    return {"sent": sent, "failed": failed}

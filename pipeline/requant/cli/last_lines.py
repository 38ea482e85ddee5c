"""What a finished run prints: its report, where report and checkpoint are, the next command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from requant.cli import run_paths
from requant.cli.wrapping import say
from requant_eval.escaping import visible

if TYPE_CHECKING:
    from requant_eval.report.records import Report

INDENT = 12  # of the text beside the names


def show(run: Path, report: Report, *, suggest: bool = False) -> None:
    """Print all of it. run: the run's directory. suggest: the suggested patch too."""
    from rich.console import Console

    from requant_eval.render import terminal

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(terminal.table(report))
    if suggest:
        console.print(terminal.suggestion(report))
        print(visible(report["facts"]["suggestion"]["patch"]), end="")
    checkpoint, _ = run_paths.checkpoint_in(run)
    lines = {
        "report": str(run / "report.html"),
        "checkpoint": str(checkpoint),
        "next": following(report, run),
    }
    for name, text in lines.items():
        say(f"{name:<{INDENT}}{text}", indent=INDENT)


def _undecided(report: Report) -> str:
    """What the inconclusive gates were measured on."""
    gates = [gate for gate in report["gates"] if gate["status"] == "inconclusive"]
    tasks = list(dict.fromkeys(f"the task {gate['set']}" for gate in gates if gate["metric"] == "task"))
    sets = [] if tasks and all(gate["metric"] == "task" for gate in gates) else ["the evaluation sets"]
    return " and ".join([*sets, *tasks])


def following(report: Report, run: Path) -> str:
    """What to do next, by the verdict.

    The run's own recipe is named, not the command's: it has the settings of `--set`.
    """
    status, more = report["verdict"]["status"], report["verdict"]["more_documents"]
    if status == "fail":
        return f"`requant report {run / 'recipe.yaml'} --suggest` measures which modules are worth more bits"
    if status == "inconclusive":
        count = f"about {more} more held-out documents" if more else "more held-out documents"
        return f"give {_undecided(report)} {count} and start the same command again: nothing else is done twice"
    formats = report["facts"].get("formats", {}).values()
    served = next((run / one["directory"] for one in formats if "vllm" in one["read_by"]), None)
    if served is not None:
        return f"`vllm serve {served}`; `requant verify {served} --with vllm` proves it in the server first"
    others = list(dict.fromkeys(name for one in formats for name in one["read_by"]))
    return f"load it in {' or '.join(others) or 'no engine that is known'}: vLLM reads none of its formats"

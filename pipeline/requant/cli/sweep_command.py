"""The command sweep: a run for each combination of values, then their comparison."""

from __future__ import annotations

import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from requant.cli import exit_codes, report_commands, run_paths
from requant.cli.console import ConsoleWatcher
from requant.cli.foreign_output import quiet
from requant.cli.outputs import message
from requant.cli.wrapping import say
from requant.errors import RequantError, bounded
from requant.runtime import signals
from requant.runtime.library_imports import importing_models

if TYPE_CHECKING:
    from requant.run.sweep import Sweep, SweepResult


def sweep(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file; or the directory of a run.")
    ],
    settings: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="KEY=VALUE,VALUE", help="Values to combine, e.g. quantize.bits=3,4; may be given again."
        ),
    ],
) -> None:
    """Run every combination of some values, then compare the runs.

    What the runs have in common is made once. Resumes where an earlier sweep stopped.
    """
    from requant.recipe.combinations import combinations
    from requant.runtime import launch

    chosen = combinations(partial(run_paths.load_recipe, recipe), settings)
    try:
        with ConsoleWatcher() as watcher:
            watcher.stage("prepare", done=False)
            with quiet():
                with importing_models():
                    from requant.run.sweep import Sweep

                prepared = Sweep(chosen, watcher, launch.current_ranks())
        results = [_run(prepared, number) for number in range(len(chosen))]
        for problem in prepared.finish(results):
            say(f"warning: {problem}", file=sys.stderr)
    except KeyboardInterrupt as error:
        launch.current_ranks().claim_end()
        raise exit_codes.interrupted(error, signals.RESUMES) from None
    _compare(results)
    _conclude(results)


def _run(prepared: Sweep, number: int) -> SweepResult:
    """One combination, under a line of its own."""
    one = prepared.combinations[number]
    say(f"{number + 1}/{len(prepared.combinations)} {one}", file=sys.stderr)
    with ConsoleWatcher() as watcher, quiet(one.path / "log.txt"):
        watcher.stage("prepare", done=False)
        result = prepared.run(one, watcher)
    if result.error is not None:
        if not isinstance(result.error, RequantError | OSError):
            traceback.print_exception(result.error)
        say(f"{one} failed: {_reason(result.error)}", file=sys.stderr)
    return result


def _reason(error: Exception) -> str:
    """An error in words."""
    if isinstance(error, RequantError):
        return str(error)
    return bounded(message(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}")


def _compare(results: list[SweepResult]) -> None:
    """Show the comparison of the runs that reached their report."""
    paths = [str(result.outcome.path) for result in results if result.outcome is not None]
    if len(paths) < 2:
        return
    try:
        report_commands.compare(paths)
    except RequantError as error:  # sets that differ, say
        say(f"not compared: {error}", file=sys.stderr)


def _conclude(results: list[SweepResult]) -> None:
    """The last lines, and exit code 1 where a combination failed."""
    failed = [result for result in results if result.outcome is None]
    for result in results:
        if result.outcome is not None:
            done = ", ".join(dict.fromkeys(result.outcome.ran)) or "up to date"
            say(f"{done}: {result.outcome.path}")
    if not failed:
        return
    names = ", ".join(str(result.combination) for result in failed)
    say(f"{len(failed)} of {len(results)} failed, the same command goes on with them: {names}", file=sys.stderr)
    raise typer.Exit(1)

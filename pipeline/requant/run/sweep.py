"""sweep(recipe, settings): a run for each combination, what they have in common made once.

Plans, tokenizer and token documents are shared in memory (`shared_inputs`); merged weights, results and scores go from
run directory to run directory, wherever their keys are the same (`RunDirectory.beside`). Each run is whole and as
`run` makes it: it can be resumed, verified and pushed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from requant import recipe
from requant.errors import InputError, RequantError
from requant.recipe.combinations import Combination, Settings, combinations
from requant.run import disk_space, prepare
from requant.run.observer import Outcome, Watcher
from requant.run.prepared import Prepared
from requant.run.runner import directory_of, discard_artifacts, run_prepared, runnable_stages
from requant.run.shared_inputs import SharedInputs
from requant.runtime import signals
from requant.runtime.ranks import SINGLE_PROCESS, Ranks


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What became of one combination: the outcome of its run, or the error that ended it."""

    combination: Combination
    outcome: Outcome | None = None
    error: Exception | None = None


def sweep(
    wanted: str | Path, settings: Settings, *, watcher: Watcher | None = None, ranks: Ranks = SINGLE_PROCESS
) -> list[SweepResult]:
    """Run every combination of `settings`, such as `{"quantize.bits": [3, 4]}`, of the recipe in a file.

    An error of one run does not end the others: it is in the result. Raises RecipeError and InputError before any work.
    """
    watcher = watcher or Watcher()
    prepared = Sweep(combinations(partial(recipe.load, wanted), settings), watcher, ranks)
    results = [prepared.run(one, watcher) for one in prepared.combinations]
    for problem in prepared.finish(results):
        watcher.warn(problem)
    return results


class Sweep:
    """The runs of a sweep, prepared and checked all before the first one starts.

    Raises InputError for combinations that cannot run, named before what is wrong with them.
    """

    def __init__(self, chosen: tuple[Combination, ...], watcher: Watcher, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.combinations, self.ranks = chosen, ranks
        self.inputs = SharedInputs.of_run(chosen[0].path)
        refused: dict[str, list[str]] = {}
        self._prepared: dict[Path, Prepared] = {}
        for one in chosen:
            try:
                directory_of(one.recipe).check()
                self._prepared[one.path] = prepare.prepare(one.recipe, _telling(watcher, one), self.inputs)
                runnable_stages(self._prepared[one.path], "report", ranks)
            except RequantError as error:
                refused.setdefault(str(error), []).append(str(one))
        if refused:
            said = [
                why if len(ones) == len(chosen) else f"{' and '.join(ones)}: {why}" for why, ones in refused.items()
            ]
            raise InputError("\n".join([*said, "nothing was run: every combination has to hold"]))
        self.inputs.release()
        disk_space.check_disk_of_all(self._prepared)

    def run(self, one: Combination, watcher: Watcher) -> SweepResult:
        """Run one combination, or what is left of it. An error is in the result; Ctrl-C is raised."""
        beside = [path for path in self._prepared if path != one.path]
        try:
            outcome = run_prepared(
                self._prepared[one.path], watcher=watcher, ranks=self.ranks, beside=beside, inputs=self.inputs
            )
        except Exception as error:
            if (arrived := signals.arrived()) is not None:  # a library has made an error of it
                raise arrived from error
            return SweepResult(combination=one, error=error)
        return SweepResult(combination=one, outcome=outcome)

    def finish(self, results: list[SweepResult]) -> list[str]:
        """Remove what the recipes do not keep, of every run that reached its report; others go on with it.

        Returns why it is still there, of runs that another process works in by now.
        """
        problems = []
        for result in results:
            if result.outcome is not None:
                try:
                    discard_artifacts(result.combination.recipe)
                except InputError as error:
                    problems.append(f"what output.keep does not name is still there: {error}")
        return problems


def _telling(watcher: Watcher, one: Combination) -> Callable[[str], None]:
    return lambda text: watcher.doing(f"{one.recipe.name}: {text}")

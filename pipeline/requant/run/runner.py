"""run(recipe): walk the list of stages, skip what is finished, run and measure the rest.

Each result is stored under its stage's key, so a killed run resumes at the stage where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from requant import outgoing, recipe
from requant.checkpoint.artifact import read_manifest
from requant.checkpoint.atomic_write import DAMAGED, remove, write_text
from requant.checkpoint.run_directory import LogFile, RunDirectory
from requant.deploy.engine_processes import installed
from requant.deploy.verification import saved_verifications
from requant.errors import InputError
from requant.merge.no_change import refuse_no_change
from requant.quantize.stage import check_ranks
from requant.recipe import named_files
from requant.recipe.fields import absolute
from requant.run import bit_budget, disk_space, expert_order, merge_onto, prepare, roads_stage
from requant.run.context import RunContext
from requant.run.convert_stage import CONVERTED
from requant.run.observer import LoggedWatcher, Outcome, Watcher
from requant.run.prepared import Prepared
from requant.run.shared_inputs import SharedInputs
from requant.run.stages import STAGES, Stage, stage_named, stages_of
from requant.run.tasks_stage import scores_of
from requant.runtime import measurements
from requant.runtime.device import pick_device
from requant.runtime.ranks import SINGLE_PROCESS, Ranks

__all__ = ["Outcome", "Runner", "Until", "Watcher", "run", "run_prepared"]

log = logging.getLogger(__name__)
Until = Literal["merge", "quantize", "heal", "evaluate", "report"]


def run(
    wanted: recipe.Recipe | str | Path,
    *,
    until: Until = "report",
    watcher: Watcher | None = None,
    suggest: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> Outcome:
    """Run a recipe, or the recipe in a file, up to and including the stage `until`.

    Raises RequantError, leaving finished stages in place.
    suggest: before the report, also measure which modules are worth more bits.
    ranks: the other processes of this run, which execute what this one calls.
    """
    wanted = recipe.load(wanted) if isinstance(wanted, str | Path) else wanted
    directory = directory_of(wanted)
    directory.check()
    watcher = watcher or Watcher()
    inputs = SharedInputs.of_run(directory.path)
    prepared = prepare.prepare(wanted, watcher.doing, inputs)
    disk_space.check_disk(prepared, directory.path)
    return run_prepared(prepared, until=until, watcher=watcher, suggest=suggest, ranks=ranks, inputs=inputs)


def directory_of(wanted: recipe.Recipe, beside: Sequence[Path] = ()) -> RunDirectory:
    """The run directory of a recipe. beside: as in `RunDirectory`."""
    return RunDirectory(Path(wanted.output.dir) / wanted.name, beside)


def run_prepared(
    prepared: Prepared,
    *,
    until: Until = "report",
    watcher: Watcher,
    suggest: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    beside: Sequence[Path] | None = None,
    inputs: SharedInputs | None = None,
) -> Outcome:
    """Run what was prepared of a recipe.

    inputs: what it was prepared with; token documents that it has made are kept on the disk.
    beside: directories of other runs, from which what is there under the same keys is taken over; then artifacts that
    the recipe does not keep are left to them, for `discard_artifacts`.
    """
    wanted, directory = prepared.recipe, directory_of(prepared.recipe, beside or ())
    watcher = LoggedWatcher(watcher)
    directory.check()
    stages = runnable_stages(prepared, until, ranks, suggest=suggest)
    _leave_out_places(prepared, directory.path)
    with directory.open(), _shown(watcher), LogFile(directory.path / "log.txt"), ExitStack() as beside_stages:
        if inputs is not None:
            inputs.save(directory)
        watcher.doing("digests of the files of base and adapter")
        prepared = expert_order.decided(prepared, directory, watcher)
        prepared = merge_onto.decided(prepared, directory, watcher, inputs)
        prepared = bit_budget.decided(prepared, directory, watcher, inputs)
        context = RunContext.of(prepared, directory, watcher, ranks)
        _take_over(context, stages)
        for stage in stages:
            if stage.ahead is not None:
                beside_stages.enter_context(stage.ahead(context))
        write_text(directory.path / "recipe.yaml", recipe.dump(wanted, directory.path))
        _tell_of_leftovers(context)
        Runner(context).run(stages)
        if until == "report" and beside is None:
            _discard(directory, wanted)
    return context.outcome


def _take_over(context: RunContext, stages: Sequence[Stage]) -> None:
    """Take scores and artifacts over from the directories beside; results are when they are asked for."""
    directory = context.directory
    if not directory.beside:
        return
    context.watcher.doing("what other runs of the sweep hold under the same keys")
    cached = [*context.scores.files, *roads_stage.files(context)]
    cached += scores_of(context).files if context.prepared.tasks else []
    files = sum(directory.take_cached(file.name) for file in cached)
    made = [stage for stage in stages if stage.artifact is not None]
    taken = [stage.name for stage in made if directory.take_artifact(str(stage.artifact), stage.key(context))]
    log.info("taken over from other runs of the sweep: %s", ", ".join([f"{files} files of scores", *taken]))


def _tell_of_leftovers(context: RunContext) -> None:
    """Name the checkpoints of an earlier recipe that this one does not make."""
    made = {stage.artifact for stage in stages_of(context.prepared)}
    for name in (stage.artifact for stage in STAGES if stage.artifact not in made):
        if name is not None and read_manifest(context.directory.path / name) is not None:
            context.watcher.warn(
                f"{context.directory.path / name} is of an earlier recipe, this one does not make it: remove it, or "
                "give the run another name (--set name=...) to keep both"
            )


def _leave_out_places(prepared: Prepared, run: Path) -> None:
    """Take the directories of this run's inputs and outputs out of all that it writes."""
    wanted, sources = prepared.recipe, prepared.sources
    texts = [absolute(path, wanted.directory).parent for _, path in named_files.named(wanted)]
    adapters = [adapter.path for adapter in prepared.merge.plan.adapters]
    models = [path for path in (sources.base, sources.original) if path]
    for place in (wanted.directory, run, *texts, *adapters, *models):
        outgoing.add_root(place)


@contextmanager
def _shown(watcher: Watcher) -> Iterator[None]:
    """Show what is found damaged as warnings of this run."""
    handler = logging.Handler()
    handler.emit = lambda record: watcher.warn(record.getMessage())  # type: ignore[method-assign]
    DAMAGED.addHandler(handler)
    try:
        yield
    finally:
        DAMAGED.removeHandler(handler)


def runnable_stages(prepared: Prepared, until: Until, ranks: Ranks, *, suggest: bool = False) -> tuple[Stage, ...]:
    """The stages to run, up to and including `until`.

    Raises InputError for a stage that this recipe does not have or cannot evaluate, for more ranks than windows, and
    for adapters that change nothing.
    """
    refuse_no_change(prepared.merge.plan)
    check_ranks(len(prepared.texts.calibration), pick_device(prepared.recipe.device), ranks)
    stages = stages_of(prepared, suggest=suggest)
    names = [stage.name for stage in stages]
    if until not in names:
        heal = prepared.recipe.heal
        raise InputError(f"heal is {heal!r}, and auto heals on a GPU only: give it settings, such as heal.steps")
    chosen = stages if until == "report" else stages[: names.index(until) + 1]
    if prepared.unmeasurable and "evaluate" in names[: len(chosen)]:
        raise InputError(f"{prepared.sources.base}: {prepared.unmeasurable}, or stop after requant quantize")
    return chosen


class Runner:
    """Walks the stages of one run: skips what is finished, runs the rest."""

    def __init__(self, context: RunContext) -> None:
        self.context = context

    def run(self, stages: tuple[Stage, ...]) -> None:
        """Finish every stage, in order."""
        for stage in stages:
            if stage.before is not None:
                stage.before(self.context)
            self._finish(stage, needed=False)

    def _finish(self, stage: Stage, *, needed: bool) -> None:
        """Run one stage unless it is finished. needed: for a later stage that reads its artifact."""
        context = self.context
        key = stage.key(context)
        if not stage.is_finished(context, key, needed=needed):
            for name in stage.needs(context):
                self._finish(stage_named(name), needed=True)
            self._run(stage, key)
        elif not needed:
            context.watcher.stage(stage.name, done=True)
            self._tell_of_engines(stage, key)
            if stage.when_finished is not None:
                stage.when_finished(context)

    def _tell_of_engines(self, stage: Stage, key: str) -> None:
        """Name the engines of `deploy` that a finished checkpoint was never loaded in."""
        stored = (self.context.directory.result(stage.name, key) or {}).get("verify")
        if stage.artifact is None or not stored:
            return
        run = self.context.directory.path
        proofs = [stored, *saved_verifications(run, {stage.name: key}).values()]
        asked = {answer["engine"] for proof in proofs for answer in proof["engines"]}
        layout = stage.artifact if stage.artifact in CONVERTED else "gptq"
        wanted = self.context.prepared.quantize.served_as(layout, self.context.recipe.deploy)
        names = [name for name in installed(wanted) if name not in asked]
        if names:
            options = " ".join(f"--with {name}" for name in names)
            self.context.watcher.warn(
                f"deploy: {stage.artifact} was finished before {' and '.join(names)} stood there and was not loaded in "
                f"it: requant verify {run / stage.artifact} {options}"
            )

    def _run(self, stage: Stage, key: str) -> None:
        """Run one stage, measure it and store its result under `key`."""
        context = self.context
        context.watcher.stage(stage.name, done=False)
        if stage.artifact is not None and context.directory.artifact(stage.artifact).of_another(key):
            context.watcher.warn(
                f"{context.directory.path / stage.artifact} was made from other inputs or settings and is replaced "
                f"when {stage.name} is done: stop here and give the run another name (--set name=...) to keep both"
            )
        context.event(event="start", stage=stage.name)
        log.info("%s: started", stage.name)
        with measurements.measured(str(context.device)) as cost:
            result = stage.function(context, key)
        context.directory.remember(stage.name, key, {**result, **cost.facts})
        context.event(event="done", stage=stage.name, seconds=round(cost.seconds, 2), peak_rss=cost.peak_rss)
        log.info("%s: done in %.1f s, peak %.2f GB", stage.name, cost.seconds, cost.peak_rss / 1e9)
        context.outcome.ran.append(stage.name)
        if stage.scratch:
            remove(context.directory.scratch(stage.name, key))


def discard_artifacts(wanted: recipe.Recipe) -> None:
    """Remove the artifacts that a recipe does not keep, of its finished run."""
    with directory_of(wanted).open() as directory:
        _discard(directory, wanted)


def _discard(directory: RunDirectory, wanted: recipe.Recipe) -> None:
    for stage in STAGES:
        if stage.artifact is not None and stage.is_discarded(wanted):
            directory.artifact(stage.artifact).remove()

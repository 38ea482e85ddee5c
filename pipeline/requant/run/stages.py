"""The stages of a run, one record each: a new stage is a new entry of `STAGES`.

    merge -> quantize -> (heal) -> (other formats) -> evaluate -> (roads) -> (tasks) -> (suggest) -> report -> (track)

A stage has a key, the digest of all that its result depends on. A stage whose key is unchanged is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from requant.recipe import Recipe
from requant.run.context import RunContext
from requant.run.convert_stage import CONVERTED, converted_key, run_convert, source_stages
from requant.run.evaluate_stage import evaluate_needs, is_evaluated, run_evaluate
from requant.run.heal_stage import run_heal
from requant.run.merge_stage import run_merge
from requant.run.prepared import Prepared
from requant.run.quantize_stage import before_quantize, load_ahead, run_quantize
from requant.run.report_stage import is_reported, load_report, report_key, run_report
from requant.run.road_recipe import scored_roads
from requant.run.roads_stage import are_scored, gptqmodel_key, roads_key, roads_need, run_gptqmodel, run_roads
from requant.run.suggest_stage import run_suggest
from requant.run.tasks_stage import are_finished, run_tasks_stage, tasks_key, tasks_need
from requant.run.track_stage import is_tracked, run_track, track_key


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: how it is keyed, what it needs, what it runs.

    name: as in events, results and on the console. key: digest of all that the result depends on.
    function: does the work for a key; its result is stored. needs: names of stages whose artifact must be on disk.
    artifact: the checkpoint directory that it writes. discardable: the recipe may drop the artifact after the run.
    scratch: it resumes from files that are removed once its result is stored.
    only_with: what must be asked for (healing, roads, tasks, suggestions, a format), else the run has no such stage.
    finished: replaces the usual test, which is a stored result and a whole artifact.
    ahead: work that runs beside the stages before it. before: runs each time, also when the stage is finished.
    when_finished: runs in place of the stage when nothing is left to do.
    """

    name: str
    key: Callable[[RunContext], str]
    function: Callable[[RunContext, str], Mapping[str, Any]]
    needs: Callable[[RunContext], tuple[str, ...]] = lambda _: ()
    artifact: str | None = None
    discardable: bool = False
    scratch: bool = False
    only_with: str | None = None
    finished: Callable[[RunContext, str], bool] | None = None
    ahead: Callable[[RunContext], AbstractContextManager[None]] | None = None
    before: Callable[[RunContext], None] | None = None
    when_finished: Callable[[RunContext], None] | None = None

    def is_finished(self, context: RunContext, key: str, *, needed: bool = False) -> bool:
        """Whether nothing is left to do for `key`.

        needed: a later stage reads the artifact, so it must exist.
        """
        if self.finished is not None:
            return self.finished(context, key)
        stored = context.directory.result(self.name, key)
        if stored is None:
            return False
        if stored.get("failed"):
            return not stored.get("again")
        if self.artifact is None or (self.is_discarded(context.recipe) and not needed):
            return True
        return context.directory.artifact(self.artifact).whole(key)

    def is_discarded(self, recipe: Recipe) -> bool:
        """Whether the recipe drops the artifact after the run."""
        return self.discardable and self.artifact not in recipe.output.keep


STAGES: tuple[Stage, ...] = (
    Stage(
        name="merge",
        key=lambda context: context.keys.merge,
        function=run_merge,
        artifact="merged",
        discardable=True,
    ),
    Stage(
        name="quantize",
        key=lambda context: context.keys.quantize,
        function=run_quantize,
        needs=lambda _: ("merge",),
        artifact="gptq",
        ahead=load_ahead,
        before=before_quantize,
    ),
    Stage(
        name="heal",
        key=lambda context: context.keys.heal,
        function=run_heal,
        needs=lambda _: ("merge",),
        artifact="healed",
        scratch=True,
        only_with="healing",
    ),
    *(
        Stage(
            name=name,
            key=partial(converted_key, name=name),
            function=partial(run_convert, name=name),
            needs=source_stages,
            artifact=name,
            only_with=name,
        )
        for name in CONVERTED
    ),
    Stage(
        name="evaluate",
        key=lambda context: context.scores.key,
        function=run_evaluate,
        needs=evaluate_needs,
        finished=is_evaluated,
    ),
    Stage(
        name="gptqmodel",
        key=gptqmodel_key,
        function=run_gptqmodel,
        needs=lambda _: ("merge",),
        artifact="gptqmodel",
        discardable=True,
        only_with="road gptqmodel",
    ),
    Stage(
        name="roads",
        key=roads_key,
        function=run_roads,
        needs=roads_need,
        only_with="roads",
        finished=are_scored,
    ),
    Stage(
        name="tasks",
        key=tasks_key,
        function=run_tasks_stage,
        needs=tasks_need,
        only_with="tasks",
        finished=are_finished,
    ),
    Stage(
        name="suggest",
        key=lambda context: context.keys.suggest,
        function=run_suggest,
        needs=lambda _: ("merge",),
        only_with="suggestions",
    ),
    Stage(
        name="report",
        key=report_key,
        function=run_report,
        finished=is_reported,
        when_finished=load_report,
    ),
    Stage(
        name="track",
        key=track_key,
        function=run_track,
        only_with="trackers",
        finished=is_tracked,
    ),
)


def stages_of(prepared: Prepared, *, suggest: bool = False) -> tuple[Stage, ...]:
    """The stages of one recipe's run, in order."""
    included: set[str | None] = {None, *prepared.recipe.output.formats}
    roads = scored_roads(prepared.recipe)
    included |= ({"roads"} if roads else set()) | ({"road gptqmodel"} if "gptqmodel" in roads else set())
    included |= {"tasks"} if prepared.tasks else set()
    included |= {"trackers"} if prepared.recipe.output.track else set()
    included |= ({"healing"} if prepared.heal else set()) | ({"suggestions"} if suggest else set())
    return tuple(stage for stage in STAGES if stage.only_with in included)


def stage_named(name: str) -> Stage:
    """The stage called `name`."""
    return next(stage for stage in STAGES if stage.name == name)

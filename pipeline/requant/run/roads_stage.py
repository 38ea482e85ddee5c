"""Stages gptqmodel and roads of a run: what people would otherwise ship, scored alike.

What a library cannot do is no error of the run: the report says which road was not measured, and why.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from requant import __version__
from requant.checkpoint.atomic_write import read_state
from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.run_directory import key_of
from requant.errors import InputError, MemoryLackError, StageError
from requant.evaluate import evaluate, roads
from requant.evaluate.roads import RoadFacts, RoadLoader
from requant.evaluate.scores import REFERENCE, Scores
from requant.formats.gptq import SUFFIXES
from requant.quantize import gptqmodel_engine
from requant.run.context import RunContext
from requant.run.road_recipe import scored_roads
from requant.run.stage_results import GptqmodelResult, RoadOfReport, RoadsResult
from requant.runtime.device import free_memory

if TYPE_CHECKING:
    from requant_eval.scoring.token_scores import TokenScores

log = logging.getLogger(__name__)
GPTQMODEL = "gptqmodel"


def gptqmodel_key(context: RunContext) -> str:
    """Digest of the merged model, bits and group size, the calibration text and the library."""
    grid, text = context.prepared.quantize.settings.grid, context.prepared.texts.calibration_facts["digest"]
    return key_of(
        context.keys.merge, "road", roads.libraries(GPTQMODEL), grid.bits, grid.group_size, text,
        str(context.prepared.quantize.dtype), context.device.type,
    )  # fmt: skip


def run_gptqmodel(context: RunContext, key: str) -> GptqmodelResult:
    """Let gptqmodel quantize the merged model by its defaults into the artifact `gptqmodel`."""
    p, artifact = context.prepared, context.directory.artifact(GPTQMODEL)
    grid, out = p.quantize.settings.grid, artifact.begin(key)
    context.watcher.doing("gptqmodel at work")
    try:
        gptqmodel_engine.quantize_by_defaults(
            context.directory.path / "merged", out, p.texts.calibration, bits=grid.bits, group_size=grid.group_size,
            dtype=p.quantize.dtype, device=context.device, trust_remote_code=context.recipe.trust_remote_code,
        )  # fmt: skip
    except StageError as error:
        log.warning("road gptqmodel: %s", error)
        return {"made": None, "failed": str(error), "again": isinstance(error, MemoryLackError)}
    finally:
        free_memory(context.device)
    artifact.finish(key, {"stage": GPTQMODEL, "requant": __version__})
    whole, plain = _tensor_bytes(artifact.path)
    settings = f"{grid.bits} bits, groups of {grid.group_size}, the library's defaults for all else"
    facts = RoadFacts(by=roads.libraries(GPTQMODEL), settings=settings, bytes=whole, unquantized=plain)
    return {"made": facts}


def road_keys(context: RunContext) -> dict[str, str]:
    """Road -> digest of all that its model depends on; of those that the recipe asks for."""
    adapter, merged = context.keys.variants[REFERENCE], context.keys.merge
    keys = {
        "nf4-merge": lambda: key_of(adapter, "nf4-merge", roads.libraries("nf4-merge")),
        "nf4-again": lambda: key_of(merged, adapter, "nf4-again", roads.libraries("nf4-again")),
        GPTQMODEL: lambda: gptqmodel_key(context),
    }
    return {name: keys[name]() for name in scored_roads(context.recipe)}


def scores_of(context: RunContext, names: Mapping[str, str]) -> Scores:
    """The scores of some roads, beside the reference's, and their answers. names: road -> key."""
    asked = tuple(replace(one, asked=tuple(names)) for one in context.scores.questions)
    return replace(context.scores, keys={REFERENCE: context.keys.variants[REFERENCE], **names}, questions=asked)


def loader(context: RunContext) -> RoadLoader:
    """Makes the models of roads, in this run."""
    keys = road_keys(context).items()
    return RoadLoader({name: context.directory.cache / f"road-{name}-{key[:24]}.json" for name, key in keys})


def files(context: RunContext) -> list[Path]:
    """The files of the roads in the cache: scores, and what their libraries made."""
    keys = road_keys(context)
    return [*scores_of(context, keys).files, *loader(context).facts.values()] if keys else []


def roads_key(context: RunContext) -> str:
    """Digest of all that the scores of the roads depend on."""
    return key_of("roads", scores_of(context, road_keys(context)).key)


def stored(context: RunContext) -> RoadsResult | None:
    """The stage's result, where it has one."""
    if not scored_roads(context.recipe):
        return None
    found: RoadsResult | None = context.directory.result("roads", roads_key(context))  # type: ignore[assignment]
    return found


def measured(context: RunContext) -> dict[str, str]:
    """Road -> key, of those that were scored."""
    found = stored(context)
    return {name: key for name, key in road_keys(context).items() if found and name in found["roads"]}


def are_scored(context: RunContext, key: str) -> bool:
    """Whether every road has its scores, but for those that cannot be measured."""
    found = stored(context)
    if found is None or found["again"]:
        return False
    done = measured(context)
    return road_keys(context).keys() == done.keys() | found["missing"].keys() and not (
        scores_of(context, done).missing().keys() & done.keys()
    )


def roads_need(context: RunContext) -> tuple[str, ...]:
    """The checkpoints that roads without scores are made from."""
    if not scored_roads(context.recipe):
        return ()
    return needed(context, scores_of(context, road_keys(context)).missing().keys())


def needed(context: RunContext, names: object) -> tuple[str, ...]:
    """The stages whose checkpoints these roads are made from. names: a collection of roads."""
    wanted = set(names) & road_keys(context).keys()  # type: ignore[call-overload]
    found = ["merge"] if "nf4-again" in wanted else []
    if GPTQMODEL in wanted and not _failed(context):
        found.append(GPTQMODEL)
    return tuple(found)


def _failed(context: RunContext) -> GptqmodelResult | None:
    """The result of a gptqmodel that made no checkpoint."""
    found = context.directory.result(GPTQMODEL, gptqmodel_key(context))
    return cast(GptqmodelResult, found) if found and found.get("failed") else None


def run_roads(context: RunContext, key: str) -> RoadsResult:
    """Score what has no scores yet, one road after the other, on the first rank: an error on another ends the run."""
    result: RoadsResult = {"roads": {}, "missing": {}, "again": [], "streamed": [], "notes": []}
    for name, own in road_keys(context).items():
        why, again = roads.unmeasurable(name, context.variant_sources), False
        if name == GPTQMODEL and not why and (failed := _failed(context)):
            why, again = failed["failed"], failed.get("again", False)
        try:
            facts = None if why else _road(context, name, own, result)
        except (StageError, InputError) as error:
            facts, why, again = None, str(error), isinstance(error, MemoryLackError)
        if facts is None:
            result["missing"][name] = why = why or "its library told nothing of it"
            result["again"] += [name] if again else []
            context.watcher.warn(f"road {name}: not measured: {result['missing'][name]}")
        else:
            result["roads"][name] = facts
        free_memory(context.device)
    return result


def _road(context: RunContext, name: str, key: str, result: RoadsResult) -> RoadFacts | None:
    """Score one road; what its library made."""
    load = loader(context)
    done = evaluate(
        scores_of(context, {name: key}), context.variant_sources, batch=context.batch,
        stream=context.recipe.evaluate.stream, progress=context.watcher.progress, load=load,
    )  # fmt: skip
    result["streamed"] += done["streamed"]
    result["notes"] += [note for note in done["notes"] if note not in result["notes"]]
    if name == GPTQMODEL:
        made: RoadFacts | None = context.directory.result(GPTQMODEL, key)["made"]  # type: ignore[index]
        return made
    if not load.facts[name].exists():  # scored by a run whose files were damaged since
        load(name, context.variant_sources, device=context.device, dtype=context.scores.dtype)
    return read_state(load.facts[name], roads.read_facts)


def scores(context: RunContext) -> dict[str, dict[str, TokenScores]]:
    """Evaluation set -> road -> its scores, for the report."""
    done = measured(context)
    saved = scores_of(context, done)
    return {s.name: {name: saved.read(name, s) for name in done} for s in saved.sets}


def answers(context: RunContext, kind: str) -> dict[str, list[Any]]:
    """Road -> its answers to questions of a kind, for the report."""
    saved = scores_of(context, measured(context))
    return {road: given for one in saved.questions if one.kind == kind for road, given in saved.answers(one).items()}


def facts(context: RunContext) -> list[RoadOfReport]:
    """What is known of this run's quantized checkpoints and of each road, in the recipe's order, for the report."""
    found = stored(context) or RoadsResult(roads={}, missing={}, again=[], streamed=[], notes=[])
    grid, path = context.prepared.quantize.settings.grid, context.directory.path
    shape, ours = f"{grid.bits} bits, groups of {grid.group_size}", f"requant {__version__}"
    own = {name: _tensor_bytes(path / name) for name in ("gptq", *(["healed"] if context.prepared.heal else []))}
    rows = [
        _row(name, RoadFacts(by=ours, settings="", bytes=size[0], unquantized=size[1])) for name, size in own.items()
    ]
    for name in context.recipe.evaluate.roads:
        made = found["roads"].get(name)
        if name == "rtn":  # held as GPTQ is
            whole, plain = own["gptq"]
            made = RoadFacts(by=ours, settings=f"{shape}, scales from the extremes", bytes=whole, unquantized=plain)
        rows.append(_row(name, made, found["missing"].get(name)))
    return rows


def _row(name: str, made: RoadFacts | None, missing: str | None = None) -> RoadOfReport:
    return {
        "name": name,
        "by": made["by"] if made else roads.libraries(name),
        "settings": made["settings"] if made else "",
        "bytes": made["bytes"] if made else None,
        "unquantized": made["unquantized"] if made else None,
        "missing": missing,
    }


def _tensor_bytes(path: Path) -> tuple[int, int]:
    """(bytes of all tensors of a GPTQ checkpoint, of these those that are not in few bits), from headers."""
    sizes = {name: info.nbytes for name, info in Checkpoint(path).items()}
    return sum(sizes.values()), sum(n for name, n in sizes.items() if name.rpartition(".")[2] not in SUFFIXES)

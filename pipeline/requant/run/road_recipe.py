"""Roads as a recipe asks for them: refused early, and in words before the run."""

from __future__ import annotations

from collections.abc import Iterator

from requant.evaluate.roads import ROADS, libraries, nf4_settings, unmeasurable
from requant.evaluate.variant_sources import VariantSources
from requant.quantize import gptqmodel_engine
from requant.recipe import Recipe

WORK = {
    "nf4-merge": "the adapter is merged into the 4-bit base, which is loaded whole",
    "nf4-again": "the merged model is loaded whole in 4 bits",
    "gptqmodel": "the merged model is quantized once more, in that library's time and memory, which are not forecast",
}


def scored_roads(recipe: Recipe) -> tuple[str, ...]:
    """The roads that are scored as variants of their own; rtn is a variant anyway."""
    return tuple(name for name in recipe.evaluate.roads if name in ROADS)


def refuse_roads(recipe: Recipe) -> None:
    """Raise InputError for a road whose library is not installed."""
    if "gptqmodel" in recipe.evaluate.roads:
        gptqmodel_engine.check_installed(recipe.place("evaluate", "roads", recipe.evaluate.roads.index("gptqmodel")))


def sentences(recipe: Recipe, sources: VariantSources) -> Iterator[str]:
    """What each road takes, and which of them this base does not allow."""
    for name in recipe.evaluate.roads:
        if name not in ROADS:
            yield f"{name}: scored as the variant of this name"
        elif why := unmeasurable(name, sources):
            yield f"{name}: will not be measured: {why}"
        else:
            settings = "" if name == "gptqmodel" else f" ({nf4_settings(sources)[1]})"
            yield f"{name}, by {libraries(name)}{settings}: {WORK[name]}"

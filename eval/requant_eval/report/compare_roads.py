"""Roads of compared runs on one shared set: what each ships, and what else it could."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from requant_eval.metrics.records import Estimate
from requant_eval.report.records import Road


class ComparedRoad(TypedDict):
    """A road of one run. loss: percent more perplexity than the run's reference, on `set`. times: of what it ships."""

    run: str
    name: str
    ships: bool
    set: str
    loss: Estimate | None
    times: Estimate | None
    bytes: int | None


def roads_of(runs: Mapping[str, Sequence[Road]], home: str) -> list[ComparedRoad]:
    """The measured roads of the runs that have some. runs: name -> roads. home: the set that they are shown on."""
    return [
        {
            "run": run,
            "name": road["name"],
            "ships": road["ships"],
            "set": home,
            "loss": road["loss"].get(home),
            "times": road["times"].get(home),
            "bytes": road["bytes"],
        }
        for run, roads in runs.items()
        for road in roads
        if road["variant"] is not None
    ]

"""Roads: what ships beside what people would otherwise ship, each with loss, KL and size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from requant_eval.metrics import statistics as st
from requant_eval.metrics.facts import Facts, RoadFacts
from requant_eval.metrics.lookup import step_from_reference
from requant_eval.metrics.records import Estimate, EvaluationSet
from requant_eval.report.headline import QUANTIZED
from requant_eval.report.records import Road

OWN = ("merged", *reversed(QUANTIZED))  # of the run itself, as far as they were scored
BY_REQUANT = "requant"


def roads(facts: Facts, sets: Sequence[EvaluationSet]) -> list[Road]:
    """What ships and the run's other checkpoints, then the roads in the recipe's order; [] where none was asked for."""
    asked = facts.get("roads") or []
    if not asked:
        return []
    scored = [v["name"] for v in sets[0]["variants"]]
    ships = next((name for name in QUANTIZED if name in scored), None)
    sizes = (facts.get("cost") or {}).get("bytes") or {}
    known = {one["name"]: one for one in asked}
    rows: list[RoadFacts] = []
    for name in (name for name in OWN if name in scored):
        size = sizes.get(name) or (None if name == "merged" else sizes.get("gptq"))
        rows.append(known.get(name) or {"name": name, "by": BY_REQUANT, "bytes": size})
    rows += [one for one in asked if one["name"] not in OWN]
    return [_road(one, sets, ships) for one in rows]


def _road(own: RoadFacts, sets: Sequence[EvaluationSet], ships: str | None) -> Road:
    name, missing = own["name"], own.get("missing")
    steps = {s["name"]: None if missing else step_from_reference(s, name) for s in sets}
    return {
        "name": name,
        "variant": None if missing else name,
        "ships": name == ships,
        "by": own["by"],
        "settings": own.get("settings") or "",
        "bytes": own.get("bytes"),
        "unquantized": own.get("unquantized"),
        "missing": missing,
        "loss": {s: step and step["loss_percent"] for s, step in steps.items()},
        "kl": {s: step["kl"]["mean"] if step and step["kl"] else None for s, step in steps.items()},
        "times": {s["name"]: None if missing else _times(s, name, ships) for s in sets},
    }


def _times(s: EvaluationSet, name: str, ships: str | None) -> Estimate | None:
    """A road's loss in ln perplexity as a multiple of the loss of what ships, paired by document.

    None where one of the two was not compared with the reference, and where what ships has no sure loss.
    """
    step, other = step_from_reference(s, name), step_from_reference(s, ships)
    if step is None or other is None or not (other["delta"]["low"] or 0) > 0:
        return None
    nll = {v: np.asarray(s["documents"][v]["nll"], dtype=np.float64) for v in (str(s["reference"]), str(ships), name)}
    before = nll[str(s["reference"])]
    return st.ratio(nll[name] - before, nll[str(ships)] - before).record()

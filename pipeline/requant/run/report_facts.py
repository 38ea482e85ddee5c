"""Facts of a run for its report, besides scores; with names instead of local paths."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from requant import recipe
from requant.merge import adapter_match
from requant.quantize.module_results import ModuleRow
from requant.recipe import fields
from requant.run.check import delta_prediction
from requant.run.prepared import Prepared
from requant.run.recipe_texts import CalibrationFacts
from requant.run.stage_results import Measured, MergeStageResult, StageResults
from requant.runtime import measurements

PEAKS: tuple[Literal["peak_rss"], Literal["peak_device"]] = ("peak_rss", "peak_device")
MEASURED = ("seconds", *PEAKS)


class RunFacts(TypedDict):
    """`facts` of report.json; the keys that a report shows are in `requant_eval.metrics.facts`."""

    name: str
    created: str
    recipe: str
    base: dict[str, Any]
    adapter: dict[str, Any]
    merge: dict[str, Any]
    quantize: dict[str, Any]
    verify: dict[str, Any] | None
    calibration: CalibrationFacts
    heal: dict[str, Any] | None
    cost: dict[str, Any]
    evaluation: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]
    warnings: list[str]
    canaries: NotRequired[dict[str, Any] | None]
    suggestion: NotRequired[dict[str, Any] | None]


def run_facts(prepared: Prepared, stages: StageResults, run: Path, *, device: str, dtype: str) -> RunFacts:
    """The facts of one run. stages: stored results. run: its directory, for sizes."""
    r, merged, quantized = prepared.recipe, stages["merge"], stages["quantize"]
    modules = quantized.get("modules", [])
    costs = cast(Mapping[str, Measured], stages)
    return {
        "name": r.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": public_recipe(r),
        "base": {
            "name": public_name(r.base.source, r.directory),
            "nf4": asdict(prepared.sources.simulate) if prepared.sources.simulate else "pre-quantized",
        },
        "adapter": _adapters(r)
        | {"match": [_match(m) for m in prepared.merge.matches], "probe": stages.get("probe", {}).get("probes", [])},
        "merge": {k: v for k, v in merged.items() if k not in MEASURED},
        "quantize": {
            "settings": r.quantize.model_dump(),
            "bits_per_weight": quantized.get("bits_per_weight"),
            "modules": modules,
            "resonance": stages["resonance"]["prediction"],
            "left_in_16_bit": quantized.get("left", []),
            "engines": {
                v.target.name: {"loads": v.loads, "says": str(v), "source": v.target.source}
                for v in prepared.quantize.engines
            },
        },
        "verify": quantized.get("verify"),
        "calibration": prepared.texts.calibration_facts,
        "heal": _healing(prepared, stages.get("heal")),
        "cost": {
            "bytes": _bytes(prepared, run, merged),
            "seconds": {n: s["seconds"] for n, s in costs.items() if "seconds" in s},
            **{k: {n: s[k] for n, s in costs.items() if k in s} for k in PEAKS},
        },
        "evaluation": {"dtype": dtype, "protocol": r.evaluate.protocol},
        "versions": measurements.versions(),
        "hardware": measurements.hardware(device),
        "warnings": [*prepared.warnings, *_warnings(stages, modules)],
    }


def _bytes(prepared: Prepared, run: Path, merged: MergeStageResult) -> dict[str, int | None]:
    """Weights of every artifact; None where it is not known."""
    sizes = {
        "base": _base_bytes(prepared),
        "adapter": _size(prepared.sources.adapter),
        "merged": _size(run / "merged") or merged.get("bytes"),
        "gptq": _size(run / "gptq"),
    }
    return sizes | ({"healed": _size(run / "healed")} if prepared.heal else {})


def _healing(prepared: Prepared, healed: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What healing did; None where it was not asked for or `auto` left it out."""
    if prepared.heal is None or not healed:
        return None
    return {k: v for k, v in healed.items() if k not in MEASURED} | {"overlap": prepared.heal.facts.get("overlap", {})}


def public_name(source: fields.Source, directory: Path) -> str:
    """A hub id as it is, of a local path the last part only."""
    return Path(source.resolve(directory)).name if source.is_local(directory) else source.path


def _adapters(r: recipe.Recipe) -> dict[str, Any]:
    """The name of the adapter, or of all with their weights."""
    adapters = [(public_name(source, r.directory), weight) for source, weight in r.weighted_adapters]
    if len(adapters) == 1 and adapters[0][1] == 1:
        return {"name": adapters[0][0]}
    return {
        "name": " + ".join(f"{weight:g} x {name}" for name, weight in adapters),
        "parts": [{"name": name, "weight": weight} for name, weight in adapters],
    }


def _match(m: adapter_match.Match) -> dict[str, Any]:
    """The adapter-base match: signs that agree, of how many, and each of them."""
    agree, of = m.score
    return {"agree": agree, "of": of, "signs": [asdict(s) for s in m.signs]}


def public_recipe(r: recipe.Recipe) -> str:
    """The recipe as YAML, absolute paths cut to their last part."""
    return re.sub(r"(?m)^(\s*(?:- )?(?:path|model): )(['\"]?)(?:/|~)\S*/([^/\s'\"]+)", r"\1\2\3", recipe.dump(r))


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.glob("*.safetensors"))


def _base_bytes(p: Prepared) -> int | None:
    """Bytes of the 4-bit base as it is served.

    Of a 4-bit checkpoint its files; of a 16-bit one what quantizing it on the fly leaves.
    """
    if p.sources.simulate is None:
        return _size(p.sources.base)
    base, nf4 = p.merge.plan.base, p.sources.simulate
    if base.simulate is None:
        return None  # merged onto the 16-bit original: how the 4-bit base was made of it is not planned
    total = 0
    for weight in base.weights.values():
        count = math.prod(weight.shape)
        blocks = math.ceil(count / nf4.blocksize)
        absmax = blocks + 4 * math.ceil(blocks / 256) if nf4.double_quant else 4 * blocks
        packed = math.ceil(count / 2) + absmax
        total += packed if weight.kind == "simulated" else count * weight.dtype.itemsize
    return total


def _warnings(stages: StageResults, modules: Sequence[ModuleRow]) -> list[str]:
    """Warnings and notes of all stages."""
    merged = stages["merge"]
    found = [*stages.get("probe", {}).get("warnings", []), *merged.get("warnings", [])]
    found += [*stages.get("quantize", {}).get("notes", []), *stages.get("evaluate", {}).get("notes", [])]
    return [*found, *_untrained(merged), *_fallbacks(modules), *_rarely_routed(modules), *_lost_delta(modules)]


def _untrained(merged: MergeStageResult) -> list[str]:
    zero = merged.get("untrained") or []
    return [f"{len(zero)} LoRA deltas are exactly zero, e.g. {zero[0]}: they were never trained"] if zero else []


def _fallbacks(modules: Sequence[ModuleRow]) -> list[str]:
    lost = [m["name"] for m in modules if m["fallback"]]
    return [f"{len(lost)} linears were rounded without error feedback, e.g. {lost[0]}"] if lost else []


def _rarely_routed(modules: Sequence[ModuleRow]) -> list[str]:
    """A warning about experts that the calibration text hardly uses."""
    rare = [m["name"] for m in modules if m.get("added", 0) > 0.5]
    if not rare:
        return []
    return [
        f"{len(rare)} matrices of experts were calibrated mostly on tokens routed elsewhere, e.g. {rare[0]}: "
        "the calibration text hardly uses these experts"
    ]


def _lost_delta(modules: Sequence[ModuleRow]) -> list[str]:
    """A warning when less of the adapter's delta is left than `delta_prediction.LIMIT`."""
    from requant_eval.render.adapter_tables import delta_retention

    share = delta_retention({"quantize": {"modules": modules}})
    if share is None or share >= delta_prediction.LIMIT:
        return []
    return [
        f"grid resonance: only {share:.0%} of the adapter's delta is in the quantized weights: try another group_size"
    ]

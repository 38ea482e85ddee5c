"""Facts of a run for its report, besides scores; with names instead of local paths."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from requant import recipe
from requant.data.canaries import CanaryFacts
from requant.deploy.verification import VerificationFacts
from requant.evaluate.adapter_probe import ProbeFacts
from requant.merge import adapter_match
from requant.merge.adapter_match import SignFacts
from requant.quantize.module_results import ModuleRow
from requant.run.base_facts import BaseFacts, base_bytes, base_facts, public_name
from requant.run.check import delta_prediction
from requant.run.format_facts import FormatFacts, format_facts, weight_bytes
from requant.run.prepared import Prepared
from requant.run.recipe_texts import CalibrationFacts
from requant.run.stage_results import (
    BudgetUnit,
    HealedFacts,
    HealStageResult,
    Measured,
    MergeFacts,
    MergeStageResult,
    PredictionFacts,
    RoadOfReport,
    StageResults,
    SuggestStageResult,
)
from requant.runtime import measurements

MEASURED = tuple(Measured.__annotations__)


class MatchFacts(TypedDict):
    """Signs that one adapter belongs to the base: how many agree, of how many, and each of them."""

    agree: int
    of: int
    signs: list[SignFacts]


class AdapterPart(TypedDict):
    """One of several adapters."""

    name: str
    weight: float


class AdapterNames(TypedDict):
    """The adapter's name. parts: of each adapter, where there are several or one is weighted."""

    name: str
    parts: NotRequired[list[AdapterPart]]


class AdapterFacts(AdapterNames):
    """The adapters, how they match the base, and the loss with and without them."""

    match: list[MatchFacts]
    probe: list[ProbeFacts]


class EngineFacts(TypedDict):
    """One engine's verdict on the plan. source: the engine's version and files with the rules."""

    loads: bool
    says: str
    source: str


class BudgetFacts(TypedDict):
    """What `quantize.budget` gave: `BudgetDecision` without its units."""

    asked: float
    mean: float
    why: str
    widths: list[int]


class QuantizeFacts(TypedDict):
    """The quantization. settings: the recipe's section `quantize`. dtype: of serving."""

    settings: dict[str, Any]
    dtype: str
    bits_per_weight: float | None
    modules: list[ModuleRow]
    resonance: PredictionFacts | None
    left_in_16_bit: list[str]
    engines: dict[str, EngineFacts]
    budget: NotRequired[BudgetFacts]
    budget_units: NotRequired[list[BudgetUnit]]


class HealFacts(HealedFacts):
    """The healing. overlap: evaluation set -> share of its 13-grams in the healing text."""

    overlap: dict[str, float]


class CostFacts(TypedDict):
    """Bytes of every artifact; wall seconds and peak bytes of every stage."""

    bytes: dict[str, int | None]
    seconds: dict[str, float]
    peak_rss: dict[str, int]
    peak_device: dict[str, int]


class EvaluationFacts(TypedDict):
    """How variants were scored. runtimes: what ran each of them."""

    dtype: str
    protocol: str
    runtimes: NotRequired[dict[str, str]]


class RunFacts(TypedDict):
    """`facts` of report.json; the keys that a report shows are in `requant_eval.metrics.facts`."""

    name: str
    created: str
    recipe: str
    base: BaseFacts
    adapter: AdapterFacts
    merge: MergeFacts
    quantize: QuantizeFacts
    verify: VerificationFacts | None
    calibration: CalibrationFacts
    heal: HealFacts | None
    formats: dict[str, FormatFacts]
    cost: CostFacts
    evaluation: EvaluationFacts
    versions: dict[str, str]
    hardware: measurements.Hardware
    warnings: list[str]
    roads: NotRequired[list[RoadOfReport]]
    canaries: NotRequired[CanaryFacts | None]
    suggestion: NotRequired[SuggestStageResult | None]


def _quantize_facts(p: Prepared, stages: StageResults) -> QuantizeFacts:
    """Settings, what each module lost, and who loads the result; of a budget what it gave."""
    quantized, choice = stages["quantize"], p.budget
    found: QuantizeFacts = {
        "settings": p.recipe.quantize.model_dump(),
        "dtype": str(p.quantize.dtype).removeprefix("torch."),
        "bits_per_weight": quantized.get("bits_per_weight"),
        "modules": quantized.get("modules", []),
        "resonance": stages["resonance"]["prediction"],
        "left_in_16_bit": quantized.get("left", []),
        "engines": {v.target.name: {"loads": v.loads, "says": str(v), "source": v.source} for v in p.quantize.engines},
    }
    if choice is not None:
        found["budget"] = {
            "asked": choice["asked"],
            "mean": choice["mean"],
            "why": choice["why"],
            "widths": choice["widths"],
        }
        found["budget_units"] = choice["units"]
    return found


def run_facts(prepared: Prepared, stages: StageResults, run: Path, *, device: str, dtype: str) -> RunFacts:
    """The facts of one run. stages: stored results. run: its directory, for sizes."""
    r = prepared.recipe
    merged, quantized = stages["merge"], stages["quantize"]
    modules = quantized.get("modules", [])
    costs = cast(Mapping[str, Measured], stages)
    return {
        "name": r.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": recipe.public(r),
        "base": base_facts(prepared),
        "adapter": {
            **_adapters(r),
            "match": [_match(m) for m in prepared.merge.matches],
            "probe": stages.get("probe", {}).get("probes", []),
        },
        "merge": cast(MergeFacts, {k: v for k, v in merged.items() if k not in MEASURED}),
        "quantize": _quantize_facts(prepared, stages),
        "verify": quantized.get("verify"),
        "calibration": prepared.texts.calibration_facts,
        "heal": _healing(prepared, stages.get("heal")),
        "formats": format_facts(prepared, stages, run),
        "cost": {
            "bytes": _bytes(prepared, run, merged),
            "seconds": {n: s["seconds"] for n, s in costs.items() if "seconds" in s},
            "peak_rss": {n: s["peak_rss"] for n, s in costs.items() if "peak_rss" in s},
            "peak_device": {n: s["peak_device"] for n, s in costs.items() if "peak_device" in s},
        },
        "evaluation": {"dtype": dtype, "protocol": r.evaluate.protocol},
        "versions": measurements.versions(),
        "hardware": measurements.hardware(device),
        "warnings": [*prepared.warnings, *_warnings(stages, modules), *_lost_delta(prepared, modules)],
    }


def _bytes(prepared: Prepared, run: Path, merged: MergeStageResult) -> dict[str, int | None]:
    """Weights of every artifact; None where it is not known."""
    sizes = {
        "base": base_bytes(prepared),
        "adapter": weight_bytes(prepared.sources.adapter),
        "merged": weight_bytes(run / "merged") or merged.get("bytes"),
        "gptq": weight_bytes(run / "gptq"),
    }
    sizes |= {"healed": weight_bytes(run / "healed")} if prepared.heal else {}
    sizes |= {name: weight_bytes(run / name) for name in prepared.recipe.output.formats if name != "gptq"}
    return sizes | {
        variant: sizes[name] for name, variant in zip(prepared.quantize.ends.formats, ("ends",), strict=False)
    }


def _healing(prepared: Prepared, healed: HealStageResult | None) -> HealFacts | None:
    """What healing did; None where it was not asked for or `auto` left it out."""
    if prepared.heal is None or not healed:
        return None
    facts = {k: v for k, v in healed.items() if k not in MEASURED}
    return cast(HealFacts, facts | {"overlap": prepared.heal.facts.get("overlap", {})})


def _adapters(r: recipe.Recipe) -> AdapterNames:
    """The name of the adapter, or of all with their weights."""
    adapters = [(public_name(source, r.directory), weight) for source, weight in r.weighted_adapters]
    if len(adapters) == 1 and adapters[0][1] == 1:
        return {"name": adapters[0][0]}
    return {
        "name": " + ".join(f"{weight:g} x {name}" for name, weight in adapters),
        "parts": [{"name": name, "weight": weight} for name, weight in adapters],
    }


def _match(m: adapter_match.Match) -> MatchFacts:
    """The adapter-base match: signs that agree, of how many, and each of them."""
    agree, of = m.score
    return {"agree": agree, "of": of, "signs": cast(list[SignFacts], [asdict(s) for s in m.signs])}


def _warnings(stages: StageResults, modules: Sequence[ModuleRow]) -> list[str]:
    """Warnings and notes of all stages."""
    merged = stages["merge"]
    found = [*stages.get("probe", {}).get("warnings", []), *merged.get("warnings", [])]
    found += [*stages.get("quantize", {}).get("notes", []), *stages.get("evaluate", {}).get("notes", [])]
    found += stages.get("roads", {}).get("notes", [])
    tasks = stages.get("tasks", {})
    found += [*tasks.get("notes", []), *(f"tasks: {name} {why}" for name, why in tasks.get("missing", {}).items())]
    return [*found, *_untrained(merged), *_fallbacks(modules), *_rarely_routed(modules)]


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


def _lost_delta(prepared: Prepared, modules: Sequence[ModuleRow]) -> list[str]:
    """A warning when less of the adapter's delta is left than `delta_prediction.LIMIT`."""
    from requant_eval.render.adapter_tables import delta_retention

    share = delta_retention({"quantize": {"modules": modules}})
    if share is None or share >= delta_prediction.LIMIT:
        return []
    why = "grid resonance: " if prepared.merge.plan.base.four_bit else ""
    return [f"{why}only {share:.0%} of the adapter's delta is in the quantized weights: try another group_size"]

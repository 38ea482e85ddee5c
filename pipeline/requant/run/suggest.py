"""Suggestions: which modules deserve more bits, and the recipe's `overrides` that give them.

Engines fuse q/k/v, gate/up and the experts of a layer, so those are one candidate each and are lifted together. vLLM
and SGLang load 4 and 8 bits: 2 and 3 are lifted to 4, 4 to 8, and 8 is not a candidate. No model is loaded here;
`module_swap` measures the gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor

from requant.evaluate.variant_sources import VariantSources
from requant.modeling.families import fused_patterns
from requant.numerics.grid import Grid
from requant.quantize.module_results import ModuleRow
from requant.quantize.plan import Plan
from requant.recipe.quantize_section import OverrideFields
from requant.run import module_swap
from requant.run.stage_results import Distance, SuggestedUnit, SuggestStageResult
from requant_eval import escaping
from requant_eval.scoring.batches import BatchSize

COUNT = 10  # candidates that are measured
LIFTED = {2: 4, 3: 4, 4: 8}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Modules that share one override.

    bits: what they would get. bytes: how much larger the checkpoint would be.
    """

    pattern: str
    modules: tuple[str, ...]
    grid: Grid
    bits: int
    bytes: int
    signal_to_noise: float | None
    relative_error: float

    def override(self, usual: Grid) -> OverrideFields:
        """The override that lifts these modules and leaves the rest of their settings as they are."""
        own: OverrideFields = {"bits": self.bits}
        if self.grid.group_size != usual.group_size:
            own["group_size"] = self.grid.group_size
        if self.grid.symmetric != usual.symmetric:
            own["symmetric"] = self.grid.symmetric
        return own


def candidates(modules: Sequence[ModuleRow], plan: Plan, count: int = COUNT) -> list[Candidate]:
    """The units whose output error is largest for their output, among them every fused partner.

    Worst first.
    modules: what quantizing each of them cost. plan: what the checkpoint holds.
    """
    results = {m["name"]: m for m in modules}
    units: dict[str, list[str]] = {}
    fused = fused_patterns(results)
    for name in results:
        units.setdefault(pattern(name, fused), []).append(name)
    found = [_candidate(p, names, results, plan) for p, names in units.items()]
    liftable = [c for c in found if c is not None]
    return sorted(liftable, key=lambda c: -c.relative_error)[:count]


def pattern(module: str, fused: Mapping[str, str]) -> str:
    """The fnmatch pattern that covers a module and everything an engine fuses it with. fused: `fused_patterns`."""
    if ".experts." in module:
        return module.split(".experts.")[0] + ".experts.*"
    return fused.get(module, module)


def _candidate(name: str, modules: Sequence[str], results: Mapping[str, ModuleRow], plan: Plan) -> Candidate | None:
    """The candidate of modules that are lifted together; None when they cannot be lifted.

    They have 8 bits already, or settings that differ among them.
    """
    grids = {plan.grids[m] for m in modules}
    grid = next(iter(grids))
    if len(grids) > 1 or grid.bits not in LIFTED:
        return None
    bits = LIFTED[grid.bits]
    loss = sum(results[m]["loss"] for m in modules)
    whole = sum(results[m]["loss"] / results[m]["relative_error"] ** 2 for m in modules if results[m]["relative_error"])
    adapted = [signal for m in modules if (signal := results[m].get("signal")) is not None]
    return Candidate(
        pattern=name,
        modules=tuple(modules),
        grid=grid,
        bits=bits,
        bytes=sum(_growth(plan, m, bits) for m in modules),
        signal_to_noise=sum(adapted) / loss if adapted and loss else None,
        relative_error=(loss / whole) ** 0.5 if whole else 0.0,
    )


def _growth(plan: Plan, module: str, bits: int) -> int:
    """Bytes that one module grows by when it gets `bits`."""
    grid = plan.grids[module]

    def size(b: int) -> int:
        rows, columns = plan.shapes[module]
        parts = plan.format.shapes(rows, columns, b, grid.group_size, symmetric=grid.symmetric).values()
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)

    return size(bits) - size(grid.bits)


def patched(
    overrides: Mapping[str, OverrideFields], chosen: Sequence[Candidate], usual: Grid
) -> dict[str, OverrideFields]:
    """The recipe's overrides with those of the candidates last, since the last match wins."""
    lifted = {c.pattern: c.override(usual) for c in chosen}
    return {k: v.copy() for k, v in overrides.items() if k not in lifted} | lifted


def patch_text(overrides: Mapping[str, OverrideFields]) -> str:
    """The YAML to paste over the recipe's `quantize.overrides`."""
    lines = ["quantize:", "  overrides:"]
    for name, own in overrides.items():
        values = ", ".join(f"{k}: {str(v).lower()}" for k, v in own.items())
        lines.append(f"    {escaping.quoted(name)}: {{{values}}}")
    return "\n".join(lines) + "\n"


def advise(
    modules: Sequence[ModuleRow],
    sources: VariantSources,
    *,
    plan: Plan,
    grid: Grid,
    overrides: Mapping[str, OverrideFields],
    calibration: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    batch: BatchSize | int,
    progress: module_swap.Progress | None = None,
) -> SuggestStageResult:
    """Every candidate with its gain, the best first, and the patch that lifts those that help.

    modules: what quantizing every module cost. plan, grid, overrides: what they were quantized with.
    calibration: windows int64 [n, length]; the first of them are scored.
    A candidate helps when its interval is above 0.
    """
    found = candidates(modules, plan)
    text = module_swap.sample(calibration)
    before, gains = module_swap.measure(
        [c.modules for c in found],
        plan.weights,
        sources,
        text,
        device=device,
        dtype=dtype,
        batch=batch,
        progress=progress,
    )
    ranked = sorted(zip(found, gains, strict=True), key=lambda pair: -pair[1]["kl"]["value"])
    chosen = [c for c, gain in ranked if gain["kl"]["low"] > 0]
    return {
        "sample": {"windows": len(text.windows), "tokens": text.n_scored},
        "before": before,
        "units": [_unit(c, gain, helps=c in chosen) for c, gain in ranked],
        "patch": patch_text(patched(overrides, chosen, grid)) if chosen else "",
    }


def _unit(c: Candidate, gain: Distance, *, helps: bool) -> SuggestedUnit:
    facts = {k: v for k, v in asdict(c).items() if k != "grid"}
    return cast(SuggestedUnit, facts | {"from_bits": c.grid.bits, "gain": gain, "helps": helps})

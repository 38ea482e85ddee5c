"""What quantize needs of a recipe: settings, layout, the engines that load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from requant.merge.plan import MergePlan
from requant.modeling import linears, skeleton
from requant.numerics.grid import Grid
from requant.quantize import gptqmodel_engine
from requant.quantize import plan as quantize_plan
from requant.quantize.plan import Plan, Settings
from requant.recipe import Recipe
from requant.run import dtypes, output_formats, served_experts
from requant.run.end_formats import planned_ends
from requant.run.prepared import QuantizeInputs


def quantize_inputs_of(recipe: Recipe, plan: MergePlan, model: Any) -> QuantizeInputs:
    """The quantized layout, and which engines load it."""
    dtype = dtypes.serving_dtype(recipe, plan)
    settings, notes = served_experts.settled(
        recipe, quantize_settings(recipe), model, lambda s: plan_quantize(plan, model, s, dtype)
    )
    if recipe.quantize.engine == "gptqmodel":
        gptqmodel_engine.check(settings)
    layout = plan_quantize(plan, model, settings, dtype)
    ends = planned_ends(recipe, model, layout, untied=plan.untied)
    engines, readers = output_formats.engines(ends.plans(layout, recipe.output.formats), model)
    told = (*notes, *ends.notes)
    return QuantizeInputs(
        plan=layout, settings=settings, dtype=dtype, engines=engines, notes=told, readers=readers, ends=ends
    )


def single_experts(recipe: Recipe, plan: MergePlan, model: Any) -> Any:
    """The skeleton with experts as Linears also where the base holds those of a layer in one tensor."""
    trust, path = recipe.trust_remote_code, plan.base.checkpoint.path
    return skeleton.open_model(path, trust_remote_code=trust, split=True) if linears.left_fused(model) else model


def quantize_settings(recipe: Recipe) -> Settings:
    q = recipe.quantize
    overrides: list[tuple[str, Mapping[str, Any] | None]] = []
    for pattern, own in q.overrides.items():
        changed = {k: v for k in ("bits", "group_size", "symmetric") if (v := getattr(own, k)) is not None}
        overrides.append((pattern, None if own.skip else changed))
    grid = Grid(q.bits, q.group_size, symmetric=q.symmetric, signed=q.signed_scales, search=q.scale_search)
    damp = None if q.damp == "auto" else float(q.damp)
    return Settings(grid=grid, order=q.order, sweeps=q.sweeps, correct=q.correct, damp=damp, overrides=tuple(overrides))


def plan_quantize(plan: MergePlan, model: Any, settings: Settings, dtype: torch.dtype) -> Plan:
    """The quantized layout of a checkpoint that is not written yet."""
    slots = {s.name: s for s in plan.slots(torch.float16)}
    return quantize_plan.plan(slots, model, settings, dtype, where=plan.base.checkpoint.path)

"""Which experts of a mixture are quantized: by default those that some server reads so.

Where none does, though one serves the model with experts in 16 bit, they stay in 16 bit: a file that nobody can serve
is not what a run is for. `quantize.experts` of the recipe says otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from requant.deploy import engine_support, engine_targets
from requant.modeling import linears
from requant.modeling.families import EXPERT
from requant.quantize.plan import Settings
from requant.recipe import Recipe

PATTERN = "*.experts.*"


def settled(recipe: Recipe, settings: Settings, model: nn.Module) -> tuple[Settings, list[str]]:
    """(the settings with the experts' share, what to tell the reader).

    model: with experts as Linears where they can be split.
    """
    fused = linears.left_fused(model)
    words = f"{len(fused)} fused expert weights stay in 16 bit, e.g. {{}}: this family's layout is not split"
    notes = [words.format(fused[0])] if fused else []
    asked, why = recipe.quantize.experts, engine_support.why_no_experts(type(model), engine_targets.TARGETS.values())
    experts = [m for n, m in model.named_modules() if EXPERT.fullmatch(n) and linears.is_linear(m)]
    if asked == "quantize" or not experts or (asked == "auto" and why is None):
        return settings, notes
    left: Any = sum(p.numel() for m in experts for p in m.parameters())
    share = left / sum(p.numel() for p in model.parameters())
    if asked == "auto":
        notes.append(
            f"the experts, {share:.0%} of the weights, stay in 16 bit, since no server reads those of "
            f"{type(model).__name__} quantized ({why}). quantize.experts: quantize quantizes them all the same"
        )
    return replace(settings, overrides=(*settings.overrides, (PATTERN, None))), notes

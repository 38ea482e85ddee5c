"""Which experts of a mixture are quantized: by default those that some server reads so.

Where none does, and one serves the model with experts in 16 bit, they stay in 16 bit: a file that nobody can serve is
not what a run is for. `quantize.experts` of the recipe says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from requant.deploy import engine_support, engine_targets
from requant.deploy.engine_classes import UNSPLIT
from requant.formats.registry import FORMATS
from requant.modeling import linears
from requant.modeling.families import EXPERT
from requant.quantize.plan import Plan, Settings
from requant.recipe import Recipe

PATTERN = "*.experts.*"
_UNKNOWN = "how their class stacks them is not known, so that no server is known to read them quantized"


def settled(
    recipe: Recipe, settings: Settings, model: nn.Module, planned: Callable[[Settings], Plan]
) -> tuple[Settings, list[str]]:
    """(the settings with the experts' share, what to tell the reader).

    model: with experts as Linears where they can be split. planned: the layout that settings give.
    """
    notes = left_fused(model)
    left = replace(settings, overrides=(*settings.overrides, (PATTERN, None)))
    if recipe.quantize.experts != "auto":
        return (left if recipe.quantize.experts == "skip" else settings), notes
    servers = [target for target in engine_targets.TARGETS.values() if target.classes]
    experts: list[Any] = [m for n, m in model.named_modules() if EXPERT.fullmatch(n) and linears.is_linear(m)]
    why = engine_support.why_no_experts(model, servers) if experts else None
    if why is None:
        return settings, notes
    which = f"experts of {type(model).__name__} quantized ({why})"
    read = [name for name in FORMATS if _is_served(planned(replace(left, format=name)), model, servers)]
    if not read:
        return settings, [*notes, f"no server reads {which}, and none in 16 bit: serve the merged checkpoint"]
    share = sum(p.numel() for m in experts for p in m.parameters()) / sum(p.numel() for p in model.parameters())
    said = (
        f"the experts, {share:.0%} of the weights, stay in 16 bit, since no server reads {which}. "
        "quantize.experts: quantize quantizes them all the same"
    )
    written = {*recipe.output.formats} & {*read}
    return left, [*notes, said if written else f"{said}; serve it as {read[0]}: add that to output.formats"]


def left_fused(model: nn.Module) -> list[str]:
    """A sentence on experts in forms of their own, one a class that holds some."""
    held: dict[str, list[str]] = {}
    for name in linears.left_fused(model):
        held.setdefault(type(model.get_submodule(name.rpartition(".")[0])).__name__, []).append(name)
    return [
        f"{len(names)} stacked expert weights stay in 16 bit, e.g. {names[0]}: {UNSPLIT.get(kind, _UNKNOWN)}"
        for kind, names in held.items()
    ]


def _is_served(plan: Plan, model: nn.Module, servers: Iterable[engine_targets.Target]) -> bool:
    return any(engine_support.judge(plan, model, server).loads for server in servers)

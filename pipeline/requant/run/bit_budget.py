"""`quantize.budget`: the width of every linear, by measured losses.

Done before the stages, since quantize and all after it depend on it. What is measured is stored and not measured again;
the choice is written into the recipe as `quantize.bits` and `quantize.overrides`, so that a run is the run of the
recipe that gives these by hand. The budget counts bits of codes; scales and zero points come on top.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TypedDict, cast

import torch

from requant.checkpoint.run_directory import RunDirectory, key_of
from requant.data.packing import digest
from requant.evaluate import planned_merge, width_losses
from requant.evaluate.planned_merge import Device
from requant.evaluate.unit_solver import Solving
from requant.evaluate.width_losses import Texts, Unit
from requant.numerics.solution import Order
from requant.quantize.plan import Plan
from requant.recipe import Recipe
from requant.recipe.quantize_section import Override, OverrideFields
from requant.run import evaluation_inputs, expert_order, prepare
from requant.run.bit_allocation import allocate
from requant.run.budget_widths import units_of
from requant.run.observer import Watcher
from requant.run.prepared import Prepared
from requant.run.shared_inputs import SharedInputs
from requant.run.stage_results import BudgetDecision, BudgetUnit
from requant.runtime.device import free_memory, pick_device

LAYOUT = 3  # raised when what is measured changes
NAME = "bit budget"


class _Losses(TypedDict):
    """As stored: of each unit, a loss for each width."""

    losses: list[list[float]]


def decided(
    prepared: Prepared, directory: RunDirectory, watcher: Watcher, inputs: SharedInputs | None = None
) -> Prepared:
    """`prepared`, with the budget of its recipe replaced by the bits of every linear, and prepared again from that.

    inputs: what it was prepared with.
    """
    budget = prepared.recipe.quantize.budget
    if budget is None:
        return prepared
    units = units_of(prepared.quantize.plan)
    losses = _measured(prepared, units, directory, watcher)
    bits = allocate([unit.weights for unit in units], losses, budget)
    choice = _decision(budget, units, losses, bits)
    watcher.doing(f"quantize.budget: {choice['why']}")
    recipe = _with_choice(prepared.recipe, prepared.quantize.plan, units, bits)
    again = expert_order.decided(prepare.prepare(recipe, watcher.doing, inputs), directory, watcher)
    return replace(again, choice=prepared.choice, budget=choice)


def ahead(prepared: Prepared) -> str:
    """What a run will measure, in a sentence for `check`."""
    text = texts_of(prepared, pick_device(prepared.recipe.device).type)
    widths, units = ", ".join(map(str, prepared.widths)), units_of(prepared.quantize.plan)
    return (
        f"{prepared.recipe.quantize.budget:g} bits of codes a weight: run first measures the loss of "
        f"{len(units)} units at {widths} bits on {text.measured.numel()} calibration tokens, "
        f"each solved from {text.learned.numel()} others; until then figures here are those of one width, no narrower"
    )


def texts_of(prepared: Prepared, device: str) -> Texts:
    """What losses are measured on and solved from, on a type of device."""
    plan = prepared.quantize.plan
    return width_losses.texts(prepared.texts.calibration, device, width_losses.widest(units_of(plan), plan.shapes))


def _with_choice(recipe: Recipe, plan: Plan, units: Sequence[Unit], bits: Sequence[int]) -> Recipe:
    """The recipe with the width of most weights as `bits`, and the other units in `overrides`."""
    weights = Counter[int]()
    for unit, width in zip(units, bits, strict=True):
        weights[width] += unit.weights
    usual = weights.most_common(1)[0][0]
    q = recipe.quantize
    own: dict[str, OverrideFields] = {}
    for unit, width in zip(units, bits, strict=True):
        touched = any(fnmatch.fnmatchcase(name, key) for key in q.overrides for name in unit.grids)
        if width != usual or touched:
            own |= _overrides(unit, width, plan, recipe)
    added = {name: Override.model_validate(fields) for name, fields in own.items()}
    kept = {name: one for name, one in q.overrides.items() if name not in added}
    changed = {"bits": usual, "budget": None, "overrides": kept | added}
    return recipe.model_copy(update={"quantize": q.model_copy(update=changed)})


def _overrides(unit: Unit, width: int, plan: Plan, recipe: Recipe) -> dict[str, OverrideFields]:
    """The settings of a unit: one pattern, or its linears by name where the pattern would cover others."""
    q, fields = recipe.quantize, dict[str, OverrideFields]()
    for name, grid in unit.grids.items():
        own: OverrideFields = {"bits": width}
        if grid.group_size != q.group_size:
            own["group_size"] = grid.group_size
        if grid.symmetric != q.symmetric:
            own["symmetric"] = grid.symmetric
        fields[name] = own
    left = any(fnmatch.fnmatchcase(name, unit.pattern) for name in plan.left)
    alike = all(own == next(iter(fields.values())) for own in fields.values())
    return fields if left or not alike else {unit.pattern: next(iter(fields.values()))}


def _decision(
    budget: float, units: Sequence[Unit], losses: Sequence[Mapping[int, float]], bits: Sequence[int]
) -> BudgetDecision:
    """What was chosen, with its numbers, for log and report."""
    total = sum(unit.weights for unit in units)
    mean = sum(unit.weights * width for unit, width in zip(units, bits, strict=True)) / total
    chosen = sum(own[width] for own, width in zip(losses, bits, strict=True))
    widths = sorted(losses[0])
    shares = Counter[int]()
    for unit, width in zip(units, bits, strict=True):
        shares[width] += unit.weights
    spread = ", ".join(f"{shares[width] / total:.0%} at {width}" for width in widths if shares[width])
    plain = ", ".join(f"{sum(own[width] for own in losses):.4f} at {width}" for width in widths)
    return {
        "asked": budget,
        "mean": mean,
        "why": f"{mean:.3f} bits of codes a weight ({spread}); losses of units quantized one at a time add "
        f"up to {chosen:.4f} nats a token, with one width for all {plain}",
        "widths": widths,
        "units": [_row(*row) for row in zip(units, bits, losses, strict=True)],
    }


def _row(unit: Unit, bits: int, losses: Mapping[int, float]) -> BudgetUnit:
    return {
        "pattern": unit.pattern,
        "bits": bits,
        "weights": unit.weights,
        "losses": [losses[width] for width in sorted(losses)],
    }


def _measured(
    prepared: Prepared, units: Sequence[Unit], directory: RunDirectory, watcher: Watcher
) -> list[dict[int, float]]:
    """The losses of every unit by width, measured or as they were stored."""
    plan, widths = prepared.merge.plan, prepared.widths
    budget = cast(float, prepared.recipe.quantize.budget)
    width = max(bits for bits in widths if bits <= budget)
    device = pick_device(prepared.recipe.device)
    text, settings = texts_of(prepared, device.type), prepared.quantize.settings
    order: Order = "activation" if settings.order == "auto" else settings.order
    solving = Solving(order=order, damp=settings.damp)
    key = key_of(
        LAYOUT,
        NAME,
        directory.fingerprint(plan.base.checkpoint.path),
        asdict(plan.base.simulate) if plan.base.simulate else None,
        [(directory.fingerprint(a.path), a.weight, a.expert_order) for a in plan.adapters],
        (digest(text.learned), digest(text.measured), asdict(solving)),
        [{name: asdict(replace(grid, bits=0)) for name, grid in unit.grids.items()} for unit in units],
        (widths, width, device.type),
    )
    stored = cast("_Losses | None", directory.result(NAME, key))
    if stored is None:
        watcher.stage(NAME, done=False)
        where = Device(device, torch.float32, evaluation_inputs.batch(prepared, device))
        trust, pieces = prepared.recipe.trust_remote_code, prepared.quantize.plan.pieces
        walk = planned_merge.walk_of(plan, where, trust_remote_code=trust, pieces=pieces)
        losses = width_losses.measure(walk, units, text, widths, width, solving, watcher.doing)
        del walk
        free_memory(device)
        stored = {"losses": [[own[bits] for bits in widths] for own in losses]}
        directory.remember(NAME, key, dict(stored))
    return [dict(zip(widths, own, strict=True)) for own in stored["losses"]]

"""Units of linears that `quantize.budget` chooses for, and the widths it may give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from requant.errors import InputError
from requant.evaluate.width_losses import MIN_WINDOWS, Unit
from requant.modeling.families import fused_patterns
from requant.quantize.plan import Plan
from requant.recipe import Recipe
from requant.recipe.fields import Bits
from requant.recipe.quantize_section import Override
from requant.run.prepared import QuantizeInputs
from requant.run.suggest import pattern

WIDTHS: tuple[int, ...] = get_args(get_args(Bits)[0])
Planned = Callable[[Recipe], QuantizeInputs]


def planned(recipe: Recipe, plan: Planned) -> tuple[QuantizeInputs, tuple[int, ...]]:
    """(what quantize needs with one width for all that is no narrower than the budget, the widths to choose from).

    The first is what is known before losses are measured, and takes no less room than the choice will.
    plan: of a recipe without a budget; raises InputError where its formats or servers refuse the width.
    Raises InputError for a budget that no widths of this recipe give, for servers that want one width for all, and for
    too few calibration windows to measure losses.
    """
    budget = recipe.quantize.budget
    assert budget is not None
    if recipe.calibration.samples < MIN_WINDOWS:
        raise InputError(
            f"{recipe.place('calibration', 'samples')}: {recipe.calibration.samples}: quantize.budget measures losses "
            f"on some calibration windows of weights that it learns from the others: expected {MIN_WINDOWS} or more"
        )
    made, refused = dict[int, QuantizeInputs](), list[InputError]()
    for bits in WIDTHS:
        try:
            made[bits] = plan(_at(recipe, bits, {}))
        except InputError as error:
            refused.append(error)
    if not made:
        raise refused[0]
    widths, where = tuple(made), recipe.place("quantize", "budget")
    if not widths[0] <= budget <= widths[-1]:
        held = " and ".join(map(str, widths))
        said = f": {str(refused[0]).splitlines()[0]}" if refused else ""
        raise InputError(
            f"{where}: {budget:g}: formats and servers of this recipe take linears of {held} bits: expected a mean "
            f"from {widths[0]} to {widths[-1]}{said}"
        )
    if len(widths) > 1:
        _refuse_mixed(recipe, plan, made[widths[0]], widths)
    return made[min(bits for bits in widths if bits >= budget)], widths


def units_of(plan: Plan) -> list[Unit]:
    """The quantized linears of a plan by what engines hold as one matrix."""
    fused = fused_patterns(plan.grids)
    names: dict[str, list[str]] = {}
    for name in plan.grids:
        names.setdefault(pattern(name, fused), []).append(name)
    return [
        Unit(
            pattern=covering,
            grids={name: plan.grids[name] for name in inside},
            weights=sum(plan.shapes[name][0] * plan.shapes[name][1] for name in inside),
        )
        for covering, inside in names.items()
    ]


def _refuse_mixed(recipe: Recipe, plan: Planned, least: QuantizeInputs, widths: tuple[int, ...]) -> None:
    """Raise InputError where a server refuses linears of several widths: every other unit gets the next width."""
    units = [unit.pattern for unit in units_of(least.plan)]
    try:
        plan(_at(recipe, widths[0], {unit: Override.model_validate({"bits": widths[1]}) for unit in units[1::2]}))
    except InputError as error:
        raise InputError(f"{recipe.place('quantize', 'budget')}: linears of several widths: {error}") from error


def _at(recipe: Recipe, bits: int, overrides: dict[str, Override]) -> Recipe:
    """The recipe with one width in place of its budget."""
    q = recipe.quantize
    changed = {"bits": bits, "budget": None, "overrides": {**q.overrides, **overrides}}
    return recipe.model_copy(update={"quantize": q.model_copy(update=changed)})

"""`quantize.embeddings` and `quantize.head`: their grids, and the formats that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from requant.deploy.gguf_export import FORMAT as GGUF
from requant.deploy.gguf_export import STAND_IN
from requant.errors import InputError
from requant.formats.quantized_format import PackError
from requant.formats.registry import FORMATS
from requant.modeling import skeleton
from requant.modeling.token_ends import EndBits, TokenEnds
from requant.numerics.grid import Grid
from requant.quantize.plan import Plan
from requant.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class PlannedEnds:
    """Quantized token embeddings and head. asked: bits. grids: by module. formats: that hold them, of the recipe's.

    kept: format that keeps them in 16 bit -> why. weights, shapes: of each module, as in `quantize.plan.Plan`.
    """

    asked: EndBits = field(default_factory=EndBits)
    grids: Mapping[str, Grid] = field(default_factory=dict)
    formats: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def of(self, name: str) -> EndBits:
        """What is asked of a format: bits where it holds them."""
        return self.asked if name in self.formats else EndBits()

    def added_to(self, plan: Plan, name: str) -> Plan:
        """A plan of linears with the ends, where the format `name` holds them."""
        if name not in self.formats:
            return plan
        return replace(plan, ends=self.grids, end_weights=self.weights, shapes={**plan.shapes, **self.shapes})

    def plans(self, plan: Plan, formats: Iterable[str]) -> dict[str, Plan]:
        """The plan of each format."""
        return {name: self.added_to(plan, name) for name in formats}

    @property
    def notes(self) -> list[str]:
        """Warnings of formats that keep 16 bit, but for gptq, of which the recipe's key says so."""
        return [f"output.formats: {name} {why}" for name, why in self.kept.items() if name != "gptq"]


def planned_ends(recipe: Recipe, model: Any, layout: Plan, *, untied: bool = False) -> PlannedEnds:
    """The ends that a recipe wants quantized.

    model: of the base. layout: of the linears. untied: whether the merge makes two matrices of one.

    Raises InputError where no format of the recipe holds them.
    """
    q = recipe.quantize
    asked = EndBits(embeddings=q.embeddings, head=q.head, group_size=q.group_size)
    if not asked:
        return PlannedEnds()
    key = "embeddings" if asked.embeddings else "head"
    where, ends = recipe.place("quantize", key), TokenEnds.of(model)
    ends = replace(ends, tied=ends.tied and not untied)
    try:
        grids = ends.grids(asked, q.group_size)
        why: dict[str, str | None] = {n: _why_not(n, ends, grids, model) for n in recipe.output.formats}
    except (InputError, PackError) as error:
        raise InputError(f"{where}: {error}") from error
    kept = {name: reason for name, reason in why.items() if reason is not None}
    if len(kept) == len(why):
        told = "; ".join(f"{name} {reason}" for name, reason in kept.items())
        raise InputError(f"{where}: no format of output.formats holds it quantized: {told}")
    names = skeleton.tensor_names(model, [slot.name for slot in layout.slots])
    shapes = {module: tuple(model.get_submodule(module).weight.shape) for module in grids}
    return PlannedEnds(
        asked=asked,
        grids=grids,
        formats=tuple(n for n in why if n not in kept),
        kept=kept,
        weights={module: names[f"{module}.weight"] for module in grids},
        shapes=shapes,
    )


def _why_not(name: str, ends: TokenEnds, grids: Mapping[str, Grid], model: Any) -> str | None:
    """Why a format keeps the ends in 16 bit, None: it does not. Raises PackError for sizes that it cannot pack."""
    layout = STAND_IN if name == GGUF else FORMATS[name]
    if not layout.ends:
        return f"holds embeddings and head in 16 bit in a run: `requant convert --to {name} --head` rounds a head"
    why = layout.why_no_ends(tied=ends.tied)
    for module, grid in grids.items() if why is None else ():
        rows, columns = model.get_submodule(module).weight.shape
        layout.shapes(rows, columns, grid.bits, grid.group_size, symmetric=True)
    return why

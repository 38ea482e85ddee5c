"""`output.formats`: which engines read which of them, and what each cannot hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from requant.checkpoint import model_files
from requant.deploy import engine_support, engine_targets, gguf_export
from requant.errors import InputError
from requant.formats.quantized_format import PackError
from requant.formats.registry import FORMATS
from requant.merge.plan import MergePlan
from requant.quantize.plan import Plan
from requant.recipe import Recipe
from requant.run.prepared import Sources

WEIGHTS = ("*.safetensors", "*.gguf")


def engines(
    plans: Mapping[str, Plan], model: Any
) -> tuple[tuple[engine_support.Verdict, ...], dict[str, tuple[str, ...]]]:
    """(verdicts of engines that know a format, on the first that each loads, format -> engines); GPTQ first.

    plans: by format, which holds embeddings and head quantized or does not. An engine that loads none of them, but
    would another format, says which.
    """
    targets = [t for t in engine_targets.TARGETS.values() if any(name in t.formats for name in plans)]
    ordered = {name: plans[name] for name in sorted(plans, key=lambda name: name != "gptq")}
    readers = {name: engine_support.readers(plan, model, targets, name) for name, plan in ordered.items()}
    return tuple(
        _with_other(engine_support.best(ordered, model, target), ordered, model) for target in targets
    ), readers


def _with_other(verdict: engine_support.Verdict, plans: Mapping[str, Plan], model: Any) -> engine_support.Verdict:
    """The verdict, with the format that its engine would load where it loads none of `plans`."""
    plan, target = next(iter(plans.values())), verdict.target
    if verdict.loads or any("output.formats" in problem for problem in verdict.problems):
        return verdict
    others = [name for name in target.formats if name in FORMATS and name not in plans]
    other = next((name for name in others if engine_support.judge(plan, model, target, name).loads), None)
    if other is None:
        return verdict
    listed = ", ".join([*plans, other])
    return replace(verdict, problems=(*verdict.problems, f"it loads {other}: set output.formats: [{listed}]"))


def stored_bytes(layout: Plan, name: str) -> int:
    """Bytes of all tensors of a planned checkpoint in one format."""
    if name == layout.format.name:
        return sum(slot.nbytes for slot in layout.slots)
    inside = {f"{w.removesuffix('weight')}{s}" for w in layout.weights.values() for s in layout.format.suffixes}
    inside |= {layout.end_weights[module] for module in layout.ends}
    kept = [slot for slot in layout.slots if slot.name not in inside]
    if name == gguf_export.FORMAT:  # whose vectors are float32
        return sum(slot.nbytes * (2 if len(slot.shape) == 1 else 1) for slot in kept) + gguf_export.packed_bytes(layout)
    of = FORMATS[name].of(symmetric=all(grid.symmetric for grid in layout.grids.values()))
    packed = (
        of.shapes(*layout.shapes[module], grid.bits, grid.group_size, symmetric=grid.symmetric).values()
        for module, grid in {**layout.grids, **layout.ends}.items()
    )
    return sum(slot.nbytes for slot in kept) + sum(math.prod(s) * t.itemsize for tensors in packed for s, t in tensors)


def refuse_unpackable(recipe: Recipe, layout: Plan) -> None:
    """Raise InputError for a linear whose width or groups one of the formats does not have."""
    for name in recipe.output.formats:
        for module, grid in layout.grids.items() if name in FORMATS else ():
            try:
                FORMATS[name].shapes(*layout.shapes[module], grid.bits, grid.group_size, symmetric=grid.symmetric)
            except PackError as error:
                raise InputError(
                    f"{_place(recipe)}: {name}: {module}: {error}: change quantize.bits, group_size or symmetric, or "
                    f"take {name} out of output.formats"
                ) from error


def refuse_gguf(recipe: Recipe, sources: Sources, merged: MergePlan, layout: Plan, model: Any) -> None:
    """Raise InputError for a checkpoint that could not be written as GGUF."""
    files = model_files.tokenizer_files(sources.base, sources.adapter)
    tokenizer = files.get("tokenizer.json", sources.base / "tokenizer.json").parent
    try:
        gguf_export.refuse_early(layout, model.config, tokenizer, merged.embedding_rows)
    except InputError as error:
        raise InputError(
            f"{_place(recipe)}: gguf: {error}: change that in the recipe, or take gguf out of output.formats"
        ) from error


def _place(recipe: Recipe) -> str:
    return recipe.place("output", "formats")


def weight_files(directory: Path) -> list[Path]:
    """The files of a directory that hold weights, in any format; none where it is no directory."""
    return [f for pattern in WEIGHTS for f in directory.glob(pattern)] if directory.is_dir() else []


def refusing_engines(asked: Mapping[str, str], verdicts: Sequence[engine_support.Verdict]) -> list[str]:
    """Warnings about engines that will not load the checkpoint. asked: those that have to -> place in the recipe.

    Raises InputError when one of them is in `asked`.
    """
    refusals = {v.target.name: v for v in verdicts if not v.loads}
    told = [f"{where}: {name} {refusals[name]} ({refusals[name].source})" for name, where in asked.items()
            if name in refusals]  # fmt: skip
    if told:
        raise InputError("\n".join([*told, "change quantize or output.formats, or do not ask for the engine there"]))
    return [] if asked else [f"{name} {verdict}" for name, verdict in refusals.items()]

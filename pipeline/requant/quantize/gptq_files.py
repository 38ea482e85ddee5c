"""The small files of a GPTQ checkpoint: config.json, quantize_config.json, tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch

from requant.checkpoint import model_files
from requant.checkpoint.reader import read_json
from requant.modeling.families import expert_groups, fused_groups
from requant.quantize.plan import Plan, Settings, _inner


class ModuleRule(TypedDict):
    """One module's settings where they are not the checkpoint's. sym: symmetric."""

    bits: int
    group_size: int
    sym: bool


def write_small_files(
    source: Path,
    out: Path,
    layout: Plan,
    settings: Settings,
    *,
    dtype: torch.dtype,
    damp: float,
    meta: Mapping[str, Any],
) -> None:
    """Write config.json, quantize_config.json, tokenizer and generation config. damp: as used."""
    overrides: dict[str, ModuleRule | None] = dict.fromkeys(layout.left)
    for name, grid in layout.grids.items():
        if grid != settings.grid:
            overrides[name] = {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric}
    overrides |= {layout.renamed[name]: own for name, own in overrides.items() if name in layout.renamed}
    every = [*layout.grids, *layout.left, *layout.renamed.values()]
    # Engines hold experts in one module of its own class, and treat it as quantized unless a rule names it.
    overrides |= _fused(overrides) | _containers(overrides, every) | dict.fromkeys(layout.fused)
    if layout.towers:
        outer = layout.prefix.rpartition(".")[0] + "."
        overrides = {name.removeprefix(outer): own for name, own in overrides.items()}
    # Only where it adds information: vLLM compares it with names of its own, which differ for gpt-oss.
    # In a wrapper it would name linears of towers too, since engines look for these names anywhere.
    list_quantized = layout.left and not layout.partly_left and not layout.towers
    inside = sorted({_inner(n, layout.prefix) for n in layout.grids}) if list_quantized else []
    quantization = layout.format.config(
        bits=settings.grid.bits,
        group_size=settings.grid.group_size,
        symmetric=settings.grid.symmetric,
        damp=damp,
        overrides=overrides,
        quantized=inside,
        carried=layout.carried,
        towers=layout.towers,
        meta=meta,
    )
    config = model_files.edit_config(
        read_json(source / "config.json", constants=True), dtype=str(dtype).removeprefix("torch.")
    )
    model_files.write_json(out / "config.json", config | {"quantization_config": quantization})
    if layout.format.config_file is not None:
        model_files.write_json(out / layout.format.config_file, quantization)
    model_files.copy_small_files(source, out)


def _fused(overrides: Mapping[str, ModuleRule | None]) -> dict[str, ModuleRule | None]:
    """The same rules under engines' fused names, where all parts share one."""
    return {
        fused: overrides[parts[0]]
        for fused, parts in fused_groups(overrides)
        if all(overrides[p] == overrides[parts[0]] for p in parts)
    }


def _containers(overrides: Mapping[str, ModuleRule | None], every: Iterable[str]) -> dict[str, ModuleRule | None]:
    """The same rules under the names of experts' containers, where all experts share one."""
    return {
        container: overrides[names[0]]
        for container, names in expert_groups(every).items()
        if all(n in overrides and overrides[n] == overrides[names[0]] for n in names)
    }

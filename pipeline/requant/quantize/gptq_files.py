"""The small files of a GPTQ checkpoint: config.json, quantize_config.json, tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch

from requant.checkpoint import model_files
from requant.checkpoint.reader import read_json
from requant.modeling.families import FUSED, called, expert_groups, fused_groups
from requant.numerics.grid import Grid
from requant.quantize.plan import Plan, Settings, _inner


class ModuleRule(TypedDict):
    """One module's settings where they are not the checkpoint's. sym: symmetric."""

    bits: int
    group_size: int
    sym: bool


class EndRule(ModuleRule):
    """Settings of the token embeddings, or of the head."""

    embeddings: bool


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
    if layout.format.by_class:
        overrides |= dict.fromkeys(layout.routers)
    overrides |= {other: own for name, own in overrides.items() if (other := called(name))}
    ends = {name: _end_rule(grid, embeddings=name not in layout.outside) for name, grid in layout.ends.items()}
    ends |= {layout.end_weights[name].removesuffix(".weight"): rule for name, rule in ends.items()}
    if layout.towers:
        outer = layout.prefix.rpartition(".")[0] + "."
        overrides = {name.removeprefix(outer): own for name, own in overrides.items()}
        ends = {name.removeprefix(outer): rule for name, rule in ends.items()}
    quantization = layout.format.config(
        bits=settings.grid.bits,
        group_size=settings.grid.group_size,
        symmetric=settings.grid.symmetric,
        damp=damp,
        overrides=overrides,
        quantized=_listed(layout),
        carried=layout.carried,
        towers=layout.towers,
        outside=layout.outside,
        blocks=layout.prefix,
        ends=ends,
        tables=layout.tables,
        meta=meta,
    )
    raw = read_json(source / "config.json", constants=True)
    config = model_files.edit_config(raw, dtype=str(dtype).removeprefix("torch."))
    config = layout.format.beside(config) | config | dict.fromkeys(layout.format.config_keys, quantization)
    model_files.write_json(out / "config.json", config)
    if layout.format.config_file is not None:
        model_files.write_json(out / layout.format.config_file, quantization)
    model_files.copy_small_files(source, out)


def _end_rule(grid: Grid, *, embeddings: bool) -> EndRule:
    return {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric, "embeddings": embeddings}


def _listed(layout: Plan) -> list[str]:
    """Names of the quantized linears for the engines that keep a list of them; empty: they need none.

    optimum looks for these at the end of a module's name, vLLM anywhere in its own name of it, or in the names of what
    it takes to be its parts. So each is the last part of a name, unless one that stays in 16 bit has that in it too,
    and the parts of what the checkpoint holds as one matrix are there as well. Written only where it adds information:
    in a wrapper it would name linears of towers too. Without it vLLM goes by the names of the checkpoint's tensors.
    """
    inside = {_inner(n, layout.prefix) for n in layout.grids}
    left = {_inner(n, layout.prefix) for n in layout.left} - inside
    leaves = {name: name.rpartition(".")[2] for name in inside}
    parts = {part for leaf in leaves.values() if leaf in FUSED for part in FUSED[leaf].parts}
    others = {other for name in inside if (other := called(name))}
    wanted = parts or others or (left and not layout.partly_left and not layout.towers)
    if not wanted:
        return []
    short = {leaf if not any(leaf in n for n in left) else name for name, leaf in leaves.items()}
    return sorted(short | parts | {o for o in others if o.rpartition(".")[2] not in short})


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

"""Plan of a conversion, from headers only: linears, their settings, their new tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from requant.checkpoint import model_files
from requant.checkpoint.writer import Slot
from requant.deploy.check_headers import UNQUANTIZED, HeaderCheck
from requant.errors import InputError
from requant.formats.quantized_format import Packing, QuantizedFormat, Reader, StoredFormat
from requant.modeling import skeleton
from requant.numerics.grid import Grid
from requant.quantize.plan import Layout, Plan, Settings, plan

_SHOWN = 5  # findings in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSettings(Settings):
    """The settings that a checkpoint was quantized with. grids: module -> its own; others are in 16 bit."""

    grids: Mapping[str, Grid] = field(default_factory=dict)

    def grid_of(self, module: str) -> Grid | None:
        """The grid of one module by its full name, None: 16 bit."""
        return self.grids.get(module)


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """What is converted, and into which tensors.

    model: skeleton on the meta device. reader, source, declared: of the checkpoint that is read. packings: module ->
    how it is packed there. plan, settings, dtype: of the one that is written. kept: names of the tensors that are
    copied. dropped: name -> why.
    """

    model: nn.Module
    reader: Reader
    source: StoredFormat
    declared: Mapping[str, Any]
    packings: Mapping[str, Packing]
    plan: Plan
    settings: Settings
    dtype: torch.dtype
    kept: tuple[str, ...]
    dropped: Mapping[str, str]


def plan_conversion(headers: HeaderCheck, target: QuantizedFormat, where: Path) -> ConversionPlan:
    """Plan the conversion of a checkpoint whose config was read. Raises InputError where it is wrong."""
    assert headers.layout is not None
    reader, checkpoint = headers.layout.reader(headers.checkpoint), headers.checkpoint
    dropped = _without_meaning(headers)
    wrong = [f"  {finding}" for finding in headers.findings if finding.where not in dropped]
    if wrong:
        raise InputError("\n".join([f"{where}: {len(wrong)} things are wrong with it:", *wrong[:_SHOWN]]))
    kept = tuple(n for n in reader if n not in reader.quantized and n not in dropped)
    dtype = _dtype(headers)
    tensors: dict[str, Layout] = {n: checkpoint[n] for n in kept}
    for stem, packing in headers.packed.items():
        shape = (packing.rows, packing.columns)
        tensors[f"{stem}.weight"] = Slot(f"{stem}.weight", dtype, shape[::-1] if stem in headers.transposed else shape)
    tensors = {name: tensors[name] for name in reader if name in tensors}
    packings = _packings(headers, tensors)
    grids = {m: Grid(p.bits, p.group_size, symmetric=p.symmetric) for m, p in packings.items()}
    if not grids:
        raise InputError(f"{where}: holds no quantized linear: nothing to convert")
    (usual, _), *_ = Counter(grids.values()).most_common(1)
    settings = StoredSettings(grid=usual, grids=grids, format=target.name)
    planned = plan(tensors, headers.model, settings, dtype, where=where)
    if left := sorted(grids.keys() - planned.grids.keys()):
        raise InputError(f"{where}: {left[0]} is quantized, and what engines read holds it in 16 bit")
    slots = tuple(replace(s, dtype=checkpoint[s.name].dtype) if s.name in kept else s for s in planned.slots)
    return ConversionPlan(
        model=headers.model,
        reader=reader,
        source=headers.layout,
        declared=headers.declared,
        packings=packings,
        plan=replace(planned, slots=slots),
        settings=settings,
        dtype=dtype,
        kept=kept,
        dropped=dropped,
    )


def _packings(headers: HeaderCheck, tensors: Mapping[str, Layout]) -> dict[str, Packing]:
    """Module of the model -> its packing, of every quantized linear."""
    names = skeleton.tensor_names(headers.model, tensors)
    return {
        parameter.removesuffix(".weight"): headers.packed[stored.removesuffix(".weight")]
        for parameter, stored in names.items()
        if stored.removesuffix(".weight") in headers.packed
    }


def _without_meaning(headers: HeaderCheck) -> dict[str, str]:
    """Stored tensors that no loader has a use for -> why: buffers that are computed, biases that are zero.

    AutoGPTQ wrote both beside the weights of models that have no such tensors.
    """
    dropped = dict.fromkeys(headers.unplaced.recomputed, "every loader computes it")
    for name in headers.unplaced.unknown:
        stem, _, leaf = name.rpartition(".")
        if leaf == "bias" and stem in headers.packed and not bool(headers.checkpoint.read(name).any()):
            dropped[name] = "a bias of zeros, of a linear that has none"
    return dropped


def _dtype(headers: HeaderCheck) -> torch.dtype:
    """The dtype that config.json declares, else that of most unquantized tensors."""
    declared = getattr(torch, str(model_files.stored_dtype(headers.checkpoint.config)), None)
    if declared in UNQUANTIZED:
        return declared  # type: ignore[no-any-return]
    packed = set(headers.packed_names)
    sizes: Counter[torch.dtype] = Counter()
    for name, info in headers.checkpoint.items():
        if name not in packed and info.dtype in UNQUANTIZED:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.float16

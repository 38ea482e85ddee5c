"""A variant's weights by their names in the 16-bit checkpoint, computed when read.

Each class is a `checkpoint.Weights`: a model is filled from it at once or block
by block. 4-bit weights are copied to `device` in 4 bits and decoded there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from requant.checkpoint.device_loader import load_onto
from requant.checkpoint.reader import Checkpoint, TensorInfo, Weights, read_tensor
from requant.formats.registry import open_quantized
from requant.merge.base_weights import BaseWeights, Nf4Settings
from requant.merge.plan import MergePlan
from requant.merge.stage import compute
from requant.modeling import cut_linears, joined_parts, skeleton
from requant.numerics import matmul_precision
from requant.numerics.dtypes import DTYPES
from requant.numerics.grid import Grid, find_scales, nearest, nearest_rows


class Decoded:
    """The decoded base, as training used it.

    rows: stored name -> number of rows. A tensor with fewer is padded with zero rows: the adapter has a larger
    vocabulary. tables: of an embedding in parts, whose values are the adapter's.
    """

    def __init__(
        self,
        base: BaseWeights,
        device: torch.device,
        rows: Mapping[str, int],
        tables: Mapping[str, TensorInfo] = MappingProxyType({}),
    ) -> None:
        self.base, self.device, self.rows, self.tables = base, device, rows, tables
        self.path = base.checkpoint.path

    def __iter__(self) -> Iterator[str]:
        return iter(self.base.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.base.weights

    def read(self, name: str) -> Tensor:
        if name in self.tables:
            return read_tensor(self.tables[name]).to(self.device)
        value = self.base.read(name, self.device, as_trained=True)
        missing = self.rows.get(name, 0) - len(value) if value.ndim else 0
        return value if missing <= 0 else torch.cat((value, value.new_zeros(missing, *value.shape[1:])))


class Merged:
    """The weights of a merge in fp32, before their one rounding."""

    def __init__(self, plan: MergePlan, device: torch.device) -> None:
        self.plan, self.path, self.device = plan, plan.base.checkpoint.path, device
        self.ops = {op.name: op for op in plan.ops}

    def __iter__(self) -> Iterator[str]:
        return iter(self.ops)

    def __contains__(self, name: object) -> bool:
        return name in self.ops

    def read(self, name: str) -> Tensor:
        with matmul_precision.full_precision():
            return compute(self.plan, self.ops[name], self.device)[0]


class Rounded:
    """A 16-bit checkpoint with some weights rounded to nearest on min-max scales, in fp32.

    grids: stored name -> grid of each weight that is rounded.
    """

    def __init__(
        self, checkpoint: Checkpoint, grids: Mapping[str, Grid], transposed: frozenset[str], device: torch.device
    ) -> None:
        self.checkpoint, self.grids, self.transposed, self.device = checkpoint, grids, transposed, device
        self.path = checkpoint.path

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint

    def read(self, name: str) -> Tensor:
        value = load_onto(self.checkpoint, name, self.device)
        if name not in self.grids:
            return value
        transposed = name in self.transposed
        rounded = _round((value.T if transposed else value).float().contiguous(), self.grids[name])
        return rounded.T if transposed else rounded


class Packed:
    """A GPTQ checkpoint, its quantized linears as fp32 `.weight`.

    transposed: stored names of Conv1D weights. Raises InputError when config.json says that the checkpoint is not
    GPTQ.
    """

    def __init__(self, path: Path, transposed: frozenset[str], device: torch.device) -> None:
        self.reader = open_quantized(path)
        self.path, self.transposed, self.device = path, transposed, device

    def __iter__(self) -> Iterator[str]:
        return iter(self.reader)

    def __contains__(self, name: object) -> bool:
        return name in self.reader

    def read(self, name: str) -> Tensor:
        value = self.reader.read(name, self.device)
        return value.T if name in self.reader.quantized and name in self.transposed else value


class RoundedEnds:
    """Weights whose token embeddings and head are rounded to nearest, as formats hold them quantized.

    grids: stored name -> grid. They are rounded on the host, where formats are written, so that codes are the same.
    """

    def __init__(self, stored: Weights, grids: Mapping[str, Grid]) -> None:
        self.stored, self.grids, self.path = stored, grids, stored.path

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def read(self, name: str) -> Tensor:
        value = self.stored.read(name)
        return nearest_rows(value.cpu(), self.grids[name]) if name in self.grids else value


def open_base(checkpoint: Checkpoint, model: nn.Module, simulate: Nf4Settings | None) -> BaseWeights:
    """The weights of a base checkpoint, with `model` as their skeleton.

    simulate: how a 16-bit base was quantized in training.
    """
    names = skeleton.tensor_names(model, checkpoint)
    parts = {names[f"{n}.weight"]: many for n, many in cut_linears.parts(model).items() if f"{n}.weight" in names}
    modules = skeleton.quantizable(model, simulate.skip, version=simulate.version) if simulate else set()
    kept = skeleton.loaded_in_fp32(model, DTYPES[simulate.load_dtype]) if simulate else set[str]()
    return BaseWeights(
        checkpoint,
        simulate=simulate,
        conv1d=_stored(skeleton.conv1d_modules(model), names),
        quantized=_stored(modules, names),
        in_fp32=frozenset(names[n] for n in kept if n in names),
        parts=parts,
        whole=_held_as_one(model, names),
    )


def replaced_tables(model: nn.Module, names: Mapping[str, str], plan: MergePlan | None) -> dict[str, TensorInfo]:
    """Stored name -> the adapter's values, of the tables of an embedding that it replaces; the module has none.

    names: parameter of the skeleton `model` -> stored name.
    """
    tables = {names[part] for parts in joined_parts.joined(model).values() for part in parts}
    return {op.name: op.replacement for op in plan.ops if op.replacement and op.name in tables} if plan else {}


def _held_as_one(model: nn.Module, names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Stored name -> the stored names of all parts of the class's weight that it is a part of."""
    found: dict[str, tuple[str, ...]] = {}
    for parts in joined_parts.joined(model).values():
        stored = tuple(names[part] for part in parts if part in names)
        found |= dict.fromkeys(stored, stored)
    return found


def rounded(checkpoint: Checkpoint, model: nn.Module, grids: Mapping[str, Grid], device: torch.device) -> Rounded:
    """Plain round-to-nearest of a 16-bit checkpoint. grids: by module of the skeleton `model`."""
    names = skeleton.tensor_names(model, checkpoint)
    stored = {names[f"{module}.weight"]: grid for module, grid in grids.items()}
    return Rounded(checkpoint, stored, _stored(skeleton.conv1d_modules(model), names), device)


def packed(path: Path, model: nn.Module, device: torch.device) -> Packed:
    """A GPTQ checkpoint of the skeleton `model`."""
    names = skeleton.tensor_names(model, Packed(path, frozenset(), device))
    return Packed(path, _stored(skeleton.conv1d_modules(model), names), device)


def with_rounded_ends(stored: Weights, model: nn.Module, ends: Mapping[str, Grid]) -> RoundedEnds:
    """`stored` with its ends rounded. ends: by module of the skeleton `model`."""
    names = skeleton.tensor_names(model, stored)
    return RoundedEnds(stored, {names[f"{module}.weight"]: grid for module, grid in ends.items()})


def _stored(modules: set[str], names: Mapping[str, str]) -> frozenset[str]:
    """The stored names of modules' weights, of those that are stored."""
    return frozenset(names[f"{module}.weight"] for module in modules if f"{module}.weight" in names)


def _round(weight: Tensor, grid: Grid) -> Tensor:
    plain = Grid(grid.bits, grid.group_size, symmetric=grid.symmetric, search="minmax")
    scales = find_scales(weight, torch.ones(weight.shape[1], device=weight.device), plain)
    return nearest(weight, scales, plain)

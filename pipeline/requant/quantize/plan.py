"""Plan of a GPTQ checkpoint, from headers only: its tensors, and the grid of every linear."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from requant.checkpoint.pieces import Piece
from requant.checkpoint.writer import Slot
from requant.errors import InputError, StageError
from requant.formats.quantized_format import PackError, QuantizedFormat
from requant.formats.registry import FORMATS
from requant.modeling import linears as linear_classes
from requant.modeling import skeleton
from requant.modeling.blocks import block_linears, block_list, towers, waits_for_an_encoder, why_not_text
from requant.modeling.families import EXPERT, in_16_bit
from requant.modeling.stacked_experts import stored_pieces
from requant.modeling.token_ends import other_tables
from requant.modeling.unplaced import Unplaced, roots
from requant.numerics.dtypes import SIXTEEN_BIT
from requant.numerics.finite import all_finite
from requant.numerics.grid import Grid

UNIT = 32  # no layout packs and no engine multiplies a matrix whose sizes are no multiples of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to quantize. overrides: (fnmatch pattern, changed Grid fields, or None for 16 bit). format: of `FORMATS`."""

    grid: Grid = Grid()  # noqa: RUF009 - frozen
    order: Literal["auto", "natural", "activation", "group"] = "auto"
    sweeps: int = 0  # of coordinate descent after the column loop
    correct: float = 0.0  # share of earlier layers' error that each layer makes up for
    damp: float | None = None  # None: 0.02 when there are 64 tokens for each input feature, else 0.05
    overrides: tuple[tuple[str, Mapping[str, Any] | None], ...] = ()
    format: str = "gptq"
    ends: Mapping[str, Grid] = field(default_factory=dict)  # of token embeddings and head; others are in 16 bit

    def grid_of(self, module: str) -> Grid | None:
        """The grid of one module by its full name, None: 16 bit. The last matching override wins."""
        grid: Grid | None = self.grid
        for pattern, own in self.overrides:
            if fnmatch.fnmatchcase(module, pattern):
                grid = None if own is None else replace(self.grid, **own)
        return grid


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A planned checkpoint: its format, the slots of its tensors, and the grid of every quantized linear."""

    format: QuantizedFormat
    slots: tuple[Slot, ...]
    block_slots: tuple[tuple[str, ...], ...]  # output tensor names of each block
    grids: Mapping[str, Grid]
    shapes: Mapping[str, tuple[int, int]]  # quantized module -> (outputs, inputs) of its weight
    left: tuple[str, ...]  # linears of blocks left in 16 bit
    bits_per_weight: float
    prefix: str  # module name of the list of blocks
    renamed: Mapping[str, str]  # linears that the checkpoint calls otherwise, apart from the base model's prefix
    weights: Mapping[str, str]  # quantized module -> name of its weight in the 16-bit checkpoint
    fused: tuple[str, ...] = ()  # modules of experts that stay fused, in 16 bit
    towers: tuple[
        str, ...
    ] = ()  # modules beside the text decoder that hold linears, by the class's and the file's names
    pieces: Mapping[str, Piece] = field(default_factory=dict)  # of stacked tensors that the 16-bit checkpoint holds
    carried: tuple[str, ...] = ()  # modules that the model class leaves out and servers may run, in 16 bit
    routers: tuple[
        str, ...
    ] = ()  # matrices of blocks that are no Linears here, by both names: engines may build them so
    outside: tuple[str, ...] = ()  # linears beside the blocks and towers, such as the head
    ends: Mapping[str, Grid] = field(default_factory=dict)  # quantized token embeddings and head
    end_weights: Mapping[str, str] = field(default_factory=dict)  # as weights, of `ends`
    tables: tuple[str, ...] = ()  # other embeddings, in 16 bit

    @property
    def partly_left(self) -> list[str]:
        """Names inside a block that are left in 16 bit in some blocks and quantized in others."""
        done, left = ({_inner(n, self.prefix) for n in names} for names in (self.grids, self.left))
        return sorted(done & left)


class Layout(Protocol):
    """Dtype and shape of a tensor that exists or will: `TensorInfo` or `Slot`."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def plan(
    tensors: Mapping[str, Layout], model: nn.Module, settings: Settings, dtype: torch.dtype, *, where: Path
) -> Plan:
    """Plan the quantized checkpoint; raises InputError listing linears that cannot be packed, or where none is left."""
    prefix, blocks = block_list(model)
    pieces = stored_pieces(model, tensors)
    names = skeleton.tensor_names(model, [*tensors, *pieces])
    linears = _linears(model, where)
    written = FORMATS[settings.format]
    skipped = tuple(f"{prefix}.{i}." for i, block in enumerate(blocks) if waits_for_an_encoder(block))
    asked = {n: settings.grid_of(n) for n in quantizable(linears) if not n.startswith(skipped)}
    grids = {n: grid for n, grid in asked.items() if grid is not None}
    if not grids:
        raise InputError(
            f"{where}: no linear is left to quantize: all {len(linears)} of its blocks stay in 16 bit, by "
            "quantize.overrides or quantize.experts: let some be quantized"
        )
    ends = {n: (grid, model.get_submodule(n)) for n, grid in settings.ends.items()}
    replaced = _replaced({n: (grid, linears[n]) for n, grid in grids.items()} | ends, names, written, where)
    unplaced = Unplaced.of(model, {name: info.shape for name, info in tensors.items()})
    slots = _slots(_kept(tensors, unplaced, dtype), pieces, replaced)
    renamed = {n: names[f"{n}.weight"].removesuffix(".weight") for n in linears}
    fused = tuple(dict.fromkeys(n.rpartition(".")[0] for n in linear_classes.left_fused(model)))
    return Plan(
        format=written.of(symmetric=all(grid.symmetric for grid in grids.values())),
        slots=tuple(slots),
        block_slots=_block_slots(slots, _stored_prefix(names, prefix), len(blocks)),
        grids=grids,
        shapes={n: _sizes(linears[n]) for n in grids} | {n: _sizes(module) for n, (_, module) in ends.items()},
        left=tuple(n for n in linears if n not in grids),
        bits_per_weight=_bits_per_weight([linears[n] for n in grids], [replaced[names[f"{n}.weight"]] for n in grids]),
        prefix=prefix,
        renamed={n: stored for n, stored in renamed.items() if not n.endswith(stored)},
        weights={n: names[f"{n}.weight"] for n in grids},
        fused=fused,
        carried=unplaced.roots,
        towers=_towers(model, names, tensors),
        pieces=pieces,
        outside=_outside(model, prefix),
        routers=_routers(model, prefix, names),
        ends=dict(settings.ends),
        end_weights={n: names[f"{n}.weight"] for n in ends},
        tables=other_tables(model, settings.ends),
    )


def _replaced(
    modules: Mapping[str, tuple[Grid, Any]], names: Mapping[str, str], written: QuantizedFormat, where: Path
) -> dict[str, list[Slot]]:
    """Stored name of a weight -> the tensors in its place. modules: name -> its grid and itself.

    Raises InputError listing modules that cannot be packed.
    """
    replaced, problems = dict[str, list[Slot]](), list[str]()
    for name, (grid, module) in modules.items():
        try:
            layout = _shapes(written, module, grid)
        except PackError as error:
            problems.append(f"{name}: {error}")
            continue
        weight = names.get(f"{name}.weight")
        if weight is None:
            problems.append(f"{name}: its weight is not in the checkpoint under a name that transformers knows")
            continue
        replaced[weight] = [Slot(f"{weight.removesuffix('weight')}{s}", t, shape) for s, (shape, t) in layout.items()]
    if problems:
        told = f"{where}: {len(problems)} linears cannot be quantized as asked, in {written.name}:"
        raise InputError("\n".join([told, *problems[:5]]))
    return replaced


def _towers(model: nn.Module, names: Mapping[str, str], tensors: Iterable[str]) -> tuple[str, ...]:
    """Towers and projectors by the class's names, and by the checkpoint's, which servers mostly keep.

    Rules name the last part alone: a name that is also one around the text decoder is no name for a tower.
    """
    found = towers(model)
    inside = [stored for name, stored in names.items() if name.startswith(tuple(f"{tower}." for tower in found))]
    others = set(tensors) - {*inside}
    taken = {part for name in (*others, block_list(model)[0]) for part in name.split(".")}
    taken |= {tower.rpartition(".")[2] for tower in found}
    return (*found, *(root for root in roots(inside, others) if root.rpartition(".")[2] not in taken))


def _linears(model: nn.Module, where: Path) -> dict[str, Any]:
    """Every Linear of the blocks by its full name; raises InputError where text alone cannot calibrate them."""
    prefix, blocks = block_list(model)
    linears = {f"{prefix}.{n}": m for n, m in block_linears(blocks).items()}
    if why := why_not_text(model) if linears else "its blocks hold no Linear":
        raise InputError(f"{where}: {type(model).__name__} cannot be quantized: {why}")
    return linears


def _shapes(written: QuantizedFormat, module: Any, grid: Grid) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a linear, or of embeddings; raises PackError."""
    return written.shapes(*_sizes(module), grid.bits, grid.group_size, symmetric=grid.symmetric)


def _sizes(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear, or rows and width of embeddings."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def _outside(model: nn.Module, prefix: str) -> tuple[str, ...]:
    """Names of the linears that are neither in the blocks nor in a tower."""
    inside = tuple(f"{root}." for root in (prefix, *towers(model)))
    return tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not f"{n}.".startswith(inside))


def _routers(model: nn.Module, prefix: str, names: Mapping[str, str]) -> tuple[str, ...]:
    """Modules of the blocks with a matrix of their own that are no Linears, by the class's and the file's names."""
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2 or linear_classes.is_linear(module) or isinstance(module, nn.Embedding):
            continue
        if name.startswith(f"{prefix}."):
            found |= dict.fromkeys((name, names.get(f"{name}.weight", name + ".weight").rpartition(".")[0]))
    return tuple(found)


def quantizable(linears: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's linears that can be quantized: a layout packs them, engines hold them so."""
    kept = in_16_bit(linears, [n for n, m in linears.items() if m.out_features % UNIT or m.in_features % UNIT])
    return {name: module for name, module in linears.items() if name not in kept}


def _slots(kept: Mapping[str, Slot], pieces: Mapping[str, Piece], replaced: Mapping[str, list[Slot]]) -> list[Slot]:
    """The slots of all tensors: packed ones for quantized weights.

    kept: of every tensor of the 16-bit checkpoint, unquantized. A stacked tensor becomes one for each piece where its
    container has a quantized expert: servers read the experts of a layer in one way.
    """
    containers = {match[1] for name in replaced if (match := EXPERT.fullmatch(name))}
    by_stacked: dict[str, list[str]] = {}
    for name, piece in pieces.items():
        if (match := EXPERT.fullmatch(name)) and match[1] in containers:
            by_stacked.setdefault(piece.stacked, []).append(name)
    slots: list[Slot] = []
    for name, slot in kept.items():
        for part in by_stacked.get(name, [name]):
            whole = slot if part == name else Slot(part, slot.dtype, pieces[part].shape)
            slots += replaced.get(part) or [whole]
    return slots


def _block_slots(slots: Iterable[Slot], prefix: str, count: int) -> tuple[tuple[str, ...], ...]:
    """Tensor names of each block. prefix: of the blocks, as stored."""
    names = [s.name for s in slots]
    return tuple(tuple(n for n in names if n.startswith(f"{prefix}.{i}.")) for i in range(count))


def _bits_per_weight(linears: Iterable[nn.Linear], packed: Iterable[Iterable[Slot]]) -> float:
    """Bits of the packed tensors for each weight of the linears that they replace."""
    return 8 * sum(s.nbytes for slots in packed for s in slots) / max(sum(m.weight.numel() for m in linears), 1)


def _kept(tensors: Mapping[str, Layout], unplaced: Unplaced, dtype: torch.dtype) -> dict[str, Slot]:
    """Slots of tensors that are not quantized, in the serving dtype.

    Buffers that the model loads, and 16-bit tensors that only servers run, stay as they are.
    """
    copies = {*unplaced.state, *(n for n in unplaced.carried if tensors[n].dtype in SIXTEEN_BIT)}
    return {
        name: Slot(name, dtype if info.dtype.is_floating_point and name not in copies else info.dtype, info.shape)
        for name, info in tensors.items()
    }


def _stored_prefix(names: Mapping[str, str], prefix: str) -> str:
    """The blocks' prefix as the checkpoint spells it."""
    name = next(n for n in names if n.startswith(prefix + ".0."))
    return (
        names[name].removesuffix(name.removeprefix(prefix))
        if names[name].endswith(name.removeprefix(prefix))
        else prefix
    )


def _inner(name: str, prefix: str) -> str:
    """A linear's name inside its block."""
    return name.removeprefix(prefix).split(".", 2)[2]


def convert(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast an unquantized tensor to the serving dtype; raises StageError when it does not fit.

    One that has the dtype is a copy, whatever it holds.
    """
    if tensor.dtype == dtype:
        return tensor
    out = tensor.to(dtype)
    if not all_finite(out):
        raise StageError(f"{name} does not fit {str(dtype).removeprefix('torch.')}: set quantize.dtype to bfloat16")
    return out

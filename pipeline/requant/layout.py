"""What a GPTQ checkpoint of a model holds: planned from headers, its small files, and reading one back."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from requant import artifacts, pack, skeleton
from requant.blocks import block_linears, block_list
from requant.checkpoint import Checkpoint, read_json
from requant.errors import InputError, StageError
from requant.grid import Grid
from requant.linears import left_fused
from requant.writer import Slot

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")
NARROW = 32  # outputs: the gate of a shared expert has one; no engine has a kernel for so few


@dataclass(frozen=True, slots=True)
class Settings:
    """How to quantize. overrides: (fnmatch pattern of a module name, changed Grid fields or None to leave in 16 bit)."""

    grid: Grid = Grid()  # noqa: RUF009 - frozen
    order: Literal["auto", "natural", "activation", "group"] = "auto"
    sweeps: int = 0  # of coordinate descent after the column loop
    correct: float = 0.0  # share of earlier layers' error that each layer makes up for
    damp: float | None = None  # None: 0.02 when there are 16 tokens for each input feature, else 0.05
    overrides: tuple[tuple[str, Mapping[str, Any] | None], ...] = ()

    def grid_of(self, module: str) -> Grid | None:
        """The grid of one module by its full name, None when it is left in 16 bit; the last matching override wins."""
        grid: Grid | None = self.grid
        for pattern, own in self.overrides:
            if fnmatch.fnmatchcase(module, pattern):
                grid = None if own is None else replace(self.grid, **own)
        return grid


@dataclass(frozen=True)
class Plan:
    """What will be written where, from headers: slots of the output, the grid of every quantized linear."""

    slots: tuple[Slot, ...]
    block_slots: tuple[tuple[str, ...], ...]  # output tensor names of each block
    grids: Mapping[str, Grid]
    left: tuple[str, ...]  # linears of blocks left in 16 bit
    bits_per_weight: float
    prefix: str  # module name of the list of blocks
    renamed: Mapping[str, str]  # linears that the checkpoint calls otherwise, apart from the base model's prefix
    weights: Mapping[str, str]  # quantized module -> name of its weight in the 16-bit checkpoint
    fused: tuple[str, ...] = ()  # modules of experts that stay fused, in 16 bit

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
    """Lay out the quantized checkpoint; raises InputError listing every linear that cannot be packed as asked."""
    prefix, blocks = block_list(model)
    names = skeleton.tensor_names(model, tensors)
    linears = {f"{prefix}.{i}.{n}": m for i, b in enumerate(blocks) for n, m in block_linears(b).items()}
    if not linears:
        raise InputError(f"{where}: the blocks of {type(model).__name__} hold no Linear to quantize")
    grids: dict[str, Grid] = {}
    problems: list[str] = []
    replaced: dict[str, list[Slot]] = {}
    for name, module in linears.items():
        grid = settings.grid_of(name)
        if grid is None or module.out_features < NARROW:
            continue
        try:
            layout = pack.shapes(module.out_features, module.in_features, grid.bits, grid.group_size)
        except pack.PackError as error:
            problems.append(f"{name}: {error}")
            continue
        grids[name] = grid
        weight = names.get(f"{name}.weight")
        if weight is None:
            problems.append(f"{name}: its weight is not in the checkpoint under a name that transformers knows")
            continue
        replaced[weight] = [Slot(f"{weight.removesuffix('weight')}{s}", t, shape) for s, (shape, t) in layout.items()]
    if problems:
        raise InputError("\n".join([f"{where}: {len(problems)} linears cannot be quantized as asked:", *problems[:5]]))
    slots = [s for name, info in tensors.items() for s in replaced.get(name, [_kept(name, info, dtype)])]
    stored_prefix = _stored_prefix(names, prefix)
    per_block = tuple(
        tuple(s.name for s in slots if s.name.startswith(f"{stored_prefix}.{i}.")) for i in range(len(blocks))
    )
    weights = sum(linears[n].weight.numel() for n in grids)
    packed_bytes = sum(s.nbytes for many in replaced.values() for s in many)
    left = tuple(n for n in linears if n not in grids)
    renamed = {n: names[f"{n}.weight"].removesuffix(".weight") for n in linears}
    renamed = {n: stored for n, stored in renamed.items() if not n.endswith(stored)}
    stored = {n: names[f"{n}.weight"] for n in grids}
    bits = 8 * packed_bytes / max(weights, 1)
    fused = tuple(dict.fromkeys(n.rpartition(".")[0] for n in left_fused(model)))
    return Plan(tuple(slots), per_block, grids, left, bits, prefix, renamed, stored, fused)


def _kept(name: str, info: Layout, dtype: torch.dtype) -> Slot:
    return Slot(name, dtype if info.dtype.is_floating_point else info.dtype, info.shape)


def _stored_prefix(names: Mapping[str, str], prefix: str) -> str:
    """The blocks' prefix as the checkpoint spells it."""
    name = next(n for n in names if n.startswith(prefix + ".0."))
    return (
        names[name].removesuffix(name.removeprefix(prefix))
        if names[name].endswith(name.removeprefix(prefix))
        else prefix
    )


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
    """config.json, quantize_config.json, tokenizer and generation config of a GPTQ checkpoint. damp: as it was used."""
    overrides: dict[str, Mapping[str, Any] | None] = dict.fromkeys(layout.left)
    for name, grid in layout.grids.items():
        if grid != settings.grid:
            overrides[name] = {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric}
    overrides |= {layout.renamed[name]: own for name, own in overrides.items() if name in layout.renamed}
    every = [*layout.grids, *layout.left, *layout.renamed.values()]
    # Engines hold experts in a class of its own, and take it for quantized unless a rule names it.
    overrides |= _fused(overrides) | _containers(overrides, every) | dict.fromkeys(layout.fused)
    # Only where it says something: vLLM compares it with names of its own, which differ for gpt-oss.
    wanted = layout.left and not layout.partly_left
    inside = sorted({_inner(n, layout.prefix) for n in layout.grids}) if wanted else []
    quantization = pack.quantization_config(
        bits=settings.grid.bits, group_size=settings.grid.group_size, symmetric=settings.grid.symmetric,
        damp=damp, overrides=overrides, quantized=inside, meta=meta,
    )  # fmt: skip
    config = artifacts.edit_config(read_json(source / "config.json"), dtype=str(dtype).removeprefix("torch."))
    artifacts.write_json(out / "config.json", config | {"quantization_config": quantization})
    artifacts.write_json(out / "quantize_config.json", quantization)
    artifacts.copy_small_files(source, out)


def _inner(name: str, prefix: str) -> str:
    """A linear's name inside its block."""
    return name.removeprefix(prefix).split(".", 2)[2]


def _fused(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The same rules under the names of engines that fuse q/k/v and gate/up, where all parts share one."""
    extra = {}
    for fused, parts in FUSED.items():
        for name, own in overrides.items():
            stem = name.removesuffix(parts[0])
            if name.endswith("." + parts[0]) and all(overrides.get(stem + p, ...) == own for p in parts):
                extra[stem + fused] = own
    return extra


def _containers(overrides: Mapping[str, Any], every: Iterable[str]) -> dict[str, Any]:
    """The same rules under the names of layers' experts, which engines hold as one, where all parts share one."""
    parts: dict[str, list[str]] = {}
    for name in every:
        match = EXPERT.fullmatch(name)
        if match:
            parts.setdefault(match[1], []).append(name)
    return {
        container: overrides[names[0]]
        for container, names in parts.items()
        if all(n in overrides and overrides[n] == overrides[names[0]] for n in names)
    }


def quantized_format(path: Path) -> str:
    """The `checkpoint_format` of a GPTQ checkpoint; raises InputError when config.json says that it is none."""
    config = read_json(path / "config.json").get("quantization_config") or {}
    if config.get("quant_method") != "gptq":
        raise InputError(
            f"{path / 'config.json'}: quantization_config.quant_method is {config.get('quant_method')!r}, expected 'gptq'"
        )
    return str(config.get("checkpoint_format"))


def load_quantized(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a GPTQ checkpoint with quantized linears dequantized to fp32 `.weight`, one at a time."""
    checkpoint = Checkpoint(path)
    v2 = quantized_format(path) == "gptq_v2"
    for name in checkpoint:
        stem, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            tensors = {s: checkpoint.read(f"{stem}.{s}") for s in pack.SUFFIXES}
            bits = 32 * tensors["qweight"].shape[0] // tensors["g_idx"].shape[0]
            yield f"{stem}.weight", pack.dequantize(tensors, bits, v2=v2)
        elif suffix not in pack.SUFFIXES:
            yield name, checkpoint.read(name)


def convert(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast an unquantized tensor to the serving dtype; raises StageError when it does not fit."""
    out = tensor.to(dtype)
    if dtype.is_floating_point and out.numel() and not torch.isfinite(torch.stack(torch.aminmax(out))).all():
        raise StageError(f"{name} does not fit {str(dtype).removeprefix('torch.')}: set quantize.dtype to bfloat16")
    return out

"""A quantized checkpoint as one GGUF file for llama.cpp, its codes as they are.

Linears become blocks of `formats.gguf_blocks`, token embeddings and head where that is asked for. What is not quantized
keeps its values too: float16 where that is exact,
else bfloat16, vectors float32. The file is written tensor by tensor, read back and compared before it gets its name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from requant.checkpoint.artifact import new_directory
from requant.checkpoint.atomic_write import writing
from requant.deploy import gguf_families, gguf_tokenizer
from requant.deploy.conversion import Progress, Steps, cannot_be_stored, checked, copy_cards, in_order, stored_bytes
from requant.deploy.conversion_plan import AS_THEY_ARE, ConversionPlan, plan_conversion
from requant.deploy.end_codes import is_nearest, rounded_end
from requant.deploy.gguf_families import Family
from requant.deploy.gguf_metadata import write_metadata
from requant.deploy.gguf_package import open_file, package, stored_bytes_of
from requant.errors import InputError, StageError
from requant.formats import gguf_blocks
from requant.formats.quantized_format import PackError
from requant.formats.registry import COMPRESSED_TENSORS
from requant.modeling import skeleton
from requant.modeling.token_ends import EndBits
from requant.numerics.grid import Grid
from requant.quantize.plan import Plan

FORMAT = "gguf"
STAND_IN = replace(COMPRESSED_TENSORS, tied_ends=True)  # in the plan of a conversion, whose tensors are not written


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of the file. kind: as GGUF calls it. shape: of its bytes, rows first.

    read: makes the bytes, uint8. rounding: bytes of the file -> the largest difference from the source, in steps of the
    weight's scale where it has one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    rounding: Callable[[Tensor], float]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape)


@dataclass(kw_only=True)
class GgufExport:
    """What was written. file: its name. kinds: of tensors -> how many. Other fields: as of `conversion.Conversion`."""

    file: str
    linears: int
    dropped: dict[str, str]
    nbytes: tuple[int, int]
    kinds: Counter[str] = field(default_factory=Counter)
    largest_rounding: float = 0.0
    ends: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GgufPlan:
    """What is written of one checkpoint. conversion: of its linears. nbytes: of its tensors. Others: as GGUF has it."""

    conversion: ConversionPlan
    config: Any
    family: Family
    tensors: tuple[GgufTensor, ...]
    nbytes: int


@torch.no_grad()
def export(
    source: Path, out: Path, *, ends: EndBits = AS_THEY_ARE, trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> GgufExport:  # fmt: skip
    """Write the quantized checkpoint in `source` as a GGUF file into the new directory `out`, with its card.

    ends: bits to which token embeddings and head are rounded to nearest.

    Raises:
        InputError: `out` is there, the package gguf is missing, or the model, its tokenizer or a width is not written.
        StageError: what was written does not decode to the same weights.
    """
    package()
    with new_directory(out) as partial:
        done = export_into(partial / "out", source, ends=ends, trust_remote_code=trust_remote_code, progress=progress)
        copy_cards(source, partial / "out", FORMAT)
    return done


def export_into(
    out: Path, source: Path, *, ends: EndBits = AS_THEY_ARE, trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> GgufExport:  # fmt: skip
    """`export` into the existing directory `out`, which gets no name of its own; without the card."""
    plan = plan_export(source, ends, trust_remote_code=trust_remote_code)
    tensors = plan.tensors
    done = GgufExport(
        file=f"model-{_file_kind(tensors)}.gguf",
        linears=len(plan.conversion.plan.grids),
        ends={name: grid.bits for name, grid in plan.conversion.rounded.items()},
        dropped=dict(plan.conversion.dropped),
        nbytes=(plan.nbytes, sum(tensor.nbytes for tensor in tensors)),
    )
    made, step = out / done.file, Steps(2 * len(tensors), progress)
    with writing(made):
        _write(made, plan, source, step)
    _compare(done, made, tensors, step)
    return done


def plan_export(source: Path, ends: EndBits = AS_THEY_ARE, *, trust_remote_code: bool = False) -> GgufPlan:
    """The tensors of the file that is written of a checkpoint. Raises InputError as `export`."""
    headers = checked(source, FORMAT, ends=ends, trust_remote_code=trust_remote_code)
    conversion = plan_conversion(headers, STAND_IN, source, ends)
    config = skeleton.load_config(source, trust_remote_code=trust_remote_code)
    family = gguf_families.family_of(config, str(source))
    for module in conversion.written:  # before the types of what stays in 16 bit, which take reading it
        _kind_of(conversion, module)
    tensors = tuple(_tensors(conversion, config, family, source))
    return GgufPlan(conversion=conversion, config=config, family=family, tensors=tensors, nbytes=stored_bytes(headers))


def refuse_early(plan: Plan, config: Any, tokenizer: Path, rows: int | None) -> None:
    """Raise InputError for a checkpoint that is planned and could not be written as GGUF.

    tokenizer: the directory of its tokenizer.json. rows: of its embedding, None: as the config says.
    """
    package()
    gguf_families.family_of(config, "the base")
    beside = [*plan.towers, *plan.carried]
    if beside:
        raise InputError(f"{beside[0]} is no part of GGUF's {config.model_type}")
    for module, grid in plan.grids.items():
        try:
            _kind(grid, plan.shapes[module][1])
        except PackError as error:
            raise InputError(f"{module} cannot be stored as {FORMAT}: {error}") from error
    gguf_tokenizer.read(tokenizer, rows or config.vocab_size)


def packed_bytes(plan: Plan) -> int:
    """Bytes of what is quantized in a planned checkpoint, as blocks."""
    return sum(
        math.prod(plan.shapes[module]) // gguf_blocks.BLOCK * gguf_blocks.BYTES[_kind(grid, plan.shapes[module][1])]
        for module, grid in {**plan.grids, **plan.ends}.items()
    )


def _kind(grid: Grid, columns: int) -> str:
    """The kind of block of a linear with so many inputs; PackError where there is none."""
    return gguf_blocks.kind_of(
        grid.bits, columns if grid.group_size == -1 else grid.group_size, symmetric=grid.symmetric
    )


def _kind_of(planned: ConversionPlan, module: str) -> str:
    """The kind of block of a quantized module; InputError where there is none."""
    try:
        return _kind(planned.grid_of(module), planned.plan.shapes[module][1])
    except PackError as error:
        raise cannot_be_stored(planned, module, FORMAT, error) from error


def _file_kind(tensors: Sequence[GgufTensor]) -> str:
    """The kind of most quantized tensors, which names the file."""
    kinds = Counter(t.kind for t in tensors if t.kind in gguf_blocks.BYTES)
    return kinds.most_common(1)[0][0]


def _tensors(planned: ConversionPlan, config: Any, family: Family, source: Path) -> Iterator[GgufTensor]:
    """The tensors of the file, quantized ones by the names of their modules."""
    gguf = package()
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.architecture.upper()), config.num_hidden_layers)
    stored = skeleton.tensor_names(planned.model, [*dict.fromkeys([*planned.written.values(), *planned.kept])])
    tied = skeleton.tied_pair(planned.model)
    written = set[str]()
    for parameter, weight in stored.items():
        if weight in written or (tied and parameter == tied[1]):
            continue
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"{source}: {weight} has no name in GGUF's {family.architecture}")
        written.add(weight)
        module = parameter.removesuffix(".weight")
        if module in planned.written:
            yield _packed(planned, config, family, module, weight, name)
        else:
            yield _plain(planned, config, family, parameter, weight, name)
    lost = [n for n in planned.kept if n not in written and not (tied and n == stored.get(tied[1]))]
    if lost:
        raise InputError(f"{source}: {lost[0]} is no part of GGUF's {family.architecture}")
    factors = gguf_families.frequency_factors(config)
    if factors is not None:
        yield GgufTensor(
            name="rope_freqs.weight",
            kind="F32",
            shape=(factors.numel() * 4,),
            read=lambda: factors.view(torch.uint8),
            rounding=lambda found: float((found.view(torch.float32) - factors).abs().max()),
        )


def _packed(planned: ConversionPlan, config: Any, family: Family, module: str, weight: str, name: str) -> GgufTensor:
    """A quantized linear, or embeddings, as blocks."""
    grid, (rows, columns) = planned.grid_of(module), planned.plan.shapes[module]
    kind = _kind_of(planned, module)
    order = gguf_families.rows(config, family, module, rows)
    stored = weight in planned.reader.quantized

    def read() -> Tensor:
        if stored:
            codes, scale, zero = in_order(planned, module, weight, FORMAT, planned.reader.decode)
        else:
            codes, scale, zero = rounded_end(planned, module)
        if order is not None:
            codes, scale, zero = codes[order], scale[order], zero[order]
        try:
            return gguf_blocks.pack_in_parts(kind, codes, scale, zero)
        except PackError as error:
            raise cannot_be_stored(planned, module, FORMAT, error) from error

    def rounding(found: Tensor) -> float:
        if not stored:
            return _of_nearest(planned, weight, grid, kind, found)
        parts = in_order(planned, module, weight, FORMAT, planned.reader.decode)
        codes, scale, zero = parts if order is None else (part[order] for part in parts)
        return gguf_blocks.steps_off(kind, found, codes, scale, zero)

    nbytes = columns // gguf_blocks.BLOCK * gguf_blocks.BYTES[kind]
    return GgufTensor(name=name, kind=kind, shape=(rows, nbytes), read=read, rounding=rounding)


def _of_nearest(planned: ConversionPlan, weight: str, grid: Grid, kind: str, found: Tensor) -> float:
    """0 where blocks hold the nearest codes to a matrix in 16 bit, by their scales; else infinity."""
    codes, scale = gguf_blocks.codes(kind, found)
    zero = torch.full_like(scale, grid.levels // 2)
    return 0.0 if is_nearest(planned.reader.checkpoint.read(weight), codes, scale, zero, grid) else math.inf


def _plain(planned: ConversionPlan, config: Any, family: Family, parameter: str, weight: str, name: str) -> GgufTensor:
    """A tensor that is not quantized: a vector in fp32, a matrix in 16 bit where that is exact."""
    checkpoint = planned.reader.checkpoint
    module, _, leaf = parameter.rpartition(".")
    shape = checkpoint[weight].shape
    order = gguf_families.rows(config, family, module, shape[0]) if leaf in ("weight", "bias") else None

    less_one = family.norms_less_one and module.endswith("norm")

    def values() -> Tensor:
        found = planned.unquantized(weight)
        if less_one:
            found = found.float() + 1  # as transformers adds it
        return found if order is None else found[order]

    kind, dtype = ("F32", torch.float32) if len(shape) == 1 else gguf_blocks.plain_kind(values())

    def read() -> Tensor:
        return values().to(dtype).contiguous().view(torch.uint8)

    def rounding(found: Tensor) -> float:
        own = values()
        wide, written = torch.promote_types(dtype, own.dtype), found.view(dtype)
        parts = gguf_blocks.parts(len(own), own.numel() // len(own))
        return 0.0 if all(torch.equal(written[p].to(wide), own[p].to(wide)) for p in parts) else math.inf

    return GgufTensor(
        name=name, kind=kind, shape=(*shape[:-1], shape[-1] * dtype.itemsize), read=read, rounding=rounding
    )


def _write(file: Path, plan: GgufPlan, source: Path, step: Steps) -> None:
    """Write header, metadata and tensors, one tensor in memory at a time."""
    tensors, config, family = plan.tensors, plan.config, plan.family
    gguf = package()
    writer = gguf.GGUFWriter(file, family.architecture)
    try:
        write_metadata(writer, config, family, source, getattr(gguf.LlamaFileType, f"MOSTLY_{_file_kind(tensors)}"))
        for tensor in tensors:
            number = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.read().numpy().reshape(tensor.shape))
            step(f"writing {tensor.name}")
    finally:
        writer.close()


def _compare(done: GgufExport, file: Path, tensors: Sequence[GgufTensor], step: Steps) -> None:
    """Raise StageError unless every tensor of the file decodes to its source; count kinds and what is rounded."""
    stored = {t.name: t for t in open_file(file).tensors}
    if stored.keys() != {t.name for t in tensors}:
        raise StageError(f"{file.name}: does not hold the tensors that were written")
    for tensor in tensors:
        largest = tensor.rounding(stored_bytes_of(stored[tensor.name]).reshape(tensor.shape))
        if largest and tensor.kind != "Q4_1":
            raise StageError(f"{file.name}: {tensor.name} does not decode to its source")
        done.largest_rounding = max(done.largest_rounding, largest)
        done.kinds[tensor.kind] += 1
        step(f"comparing {tensor.name}")

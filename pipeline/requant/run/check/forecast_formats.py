"""Forecast of the formats beside GPTQ: a piece of each kind is converted, sizes are summed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from requant.deploy.gguf_export import FORMAT as GGUF
from requant.formats import gguf_blocks, gptq
from requant.formats.quantized_format import weights
from requant.formats.registry import FORMATS, GPTQ
from requant.numerics.finite import count_not_finite
from requant.numerics.grid import Grid, round_to_grid, rounded_rows
from requant.quantize.plan import Plan
from requant.run.check.forecast_merge import Disk, Need
from requant.run.check.rehearsal import cost_of
from requant.run.output_formats import stored_bytes
from requant.run.prepared import Prepared

ROWS = 512  # of the piece that is converted
READS = 3  # of the source: its values are checked, its weights repacked, and compared
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the format stages take beside their codes.

    disk: of writing. read: seconds a byte. build: seconds to make a model's structure. check: seconds to verify what
    was written, by name. checked: peak bytes of that, of host and device.
    """

    disk: Disk
    read: float
    build: float
    check: float
    checked: tuple[int, int]


def converting(p: Prepared, rates: Rates, started: int) -> list[Need]:
    """Forecast of each format beside GPTQ that a recipe names."""
    return [_converting(p, name, rates, started) for name in p.recipe.output.formats if name != "gptq"]


def _converting(p: Prepared, name: str, rates: Rates, started: int) -> Need:
    plan = p.quantize.ends.added_to(p.quantize.plan, name)
    source, written = sum(slot.nbytes for slot in plan.slots), stored_bytes(plan, name)
    seconds = _codes(plan, name) + _ends(plan) + 4 * rates.build
    seconds += (READS * source + 2 * written) * rates.read + written * (rates.disk.write + rates.disk.sync)
    largest = 2 * max(slot.nbytes for slot in plan.slots)
    largest = max([largest, *(6 * math.prod(plan.shapes[module]) for module in plan.ends)])
    if name == GGUF:  # decoded and compared, not run
        return Need(name, seconds, started + largest, written=written)
    host, device = rates.checked
    return Need(name, seconds + rates.check, started + max(largest, host), device, written=written)


def _codes(plan: Plan, name: str) -> float:
    """Seconds to repack and compare the codes of all linears."""
    sizes = Counter[tuple[Grid, int]]()
    for module, grid in plan.grids.items():
        rows, columns = plan.shapes[module]
        sizes[grid, columns] += rows
    return sum(
        cost_of(CPU, _work(name, grid, columns)).seconds * rows / ROWS for (grid, columns), rows in sizes.items()
    )


def _work(name: str, grid: Grid, columns: int) -> Callable[[], object]:
    """The repacking of `ROWS` rows of random codes into a format, and its comparison."""
    codes = torch.randint(0, grid.levels, (ROWS, columns), dtype=torch.uint8)
    scale = torch.full((ROWS, grid.groups(columns)), 2.0**-6)
    tensors = GPTQ.pack(codes, scale, torch.full_like(scale, grid.levels // 2), grid.bits)
    if name == GGUF:
        group = columns if grid.group_size == -1 else grid.group_size
        return partial(_to_blocks, gguf_blocks.kind_of(grid.bits, group, symmetric=grid.symmetric), tensors, grid.bits)
    layout = FORMATS[name].of(symmetric=grid.symmetric)
    pack = layout.pack_stream or layout.pack

    def work() -> None:
        stream, scale, zero, _ = gptq.unpack_stream(tensors, grid.bits)
        made = pack(stream, scale, zero, grid.bits, symmetric=grid.symmetric)
        torch.equal(stream, made[layout.codes].view(torch.int32).reshape(stream.shape))  # as long as a comparison

    return work


def _to_blocks(kind: str, tensors: dict[str, torch.Tensor], bits: int) -> None:
    """A linear as blocks of GGUF; read back twice, by the conversion and by verification."""
    blocks = gguf_blocks.pack(kind, *gptq.unpack(tensors, bits)[:3])
    (gguf_blocks.unpack(kind, blocks) - weights(*gptq.unpack(tensors, bits))).abs().max()
    count_not_finite(gguf_blocks.unpack(kind, blocks))


def _ends(plan: Plan) -> float:
    """Seconds to round token embeddings and head, and to compare them."""
    seconds = 0.0
    for module, grid in plan.ends.items():
        rows, columns = plan.shapes[module]
        piece = torch.randn(ROWS, columns)

        def work(piece: torch.Tensor = piece, grid: Grid = grid) -> None:
            codes, scales = rounded_rows(piece, grid)
            torch.equal(codes, round_to_grid(piece, scales, grid))

        seconds += cost_of(CPU, work).seconds * rows / ROWS
    return seconds

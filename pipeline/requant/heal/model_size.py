"""Sizes of a quantized model that memory and time of its healing depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from requant.modeling.blocks import block_linears, block_list
from requant.modeling.moe import SplitExperts
from requant.numerics.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSize:
    """The sizes of one block, all of its experts included.

    inputs_outputs: sum of the widths of the linears that a token passes.
    """

    quantized: int  # weights
    stored_bytes: int  # of their codes
    scales: int
    other: int  # parameters left in 16 bit
    inputs_outputs: int

    @classmethod
    def of(cls, block: nn.Module, grids: Mapping[str, Grid], chosen: int | None) -> BlockSize:
        """From a block of a skeleton, and the grids of its quantized linears by their names inside the block.

        chosen: experts that a token is routed to; None: all.
        """
        linears = block_linears(block)
        quantized, stored_bytes, scales = _quantized(linears, grids)
        return cls(
            quantized=quantized,
            stored_bytes=stored_bytes,
            scales=scales,
            other=sum(p.numel() for p in block.parameters()) - quantized,
            inputs_outputs=_inputs_outputs(block, linears, chosen),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The sizes of a model. block: each figure of the block in which it is largest."""

    quantized: int  # weights
    stored_bytes: int  # of their codes
    scales: int
    other: int  # parameters left in 16 bit
    outside: int  # of these outside of the blocks
    largest: int  # weights of the largest quantized linear
    layers: int
    width: int
    vocabulary: int
    block: BlockSize

    @classmethod
    def of(cls, model: nn.Module, grids: Mapping[str, Grid]) -> ModelSize:
        """From a skeleton and the grid of every quantized linear."""
        linears = {name: model.get_submodule(name) for name in grids}
        quantized, stored_bytes, scales = _quantized(linears, grids)
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        blocks, other = _blocks(model, grids), sum(p.numel() for p in model.parameters()) - quantized
        return cls(
            quantized=quantized,
            stored_bytes=stored_bytes,
            scales=scales,
            other=other,
            outside=other - sum(b.other for b in blocks),
            largest=max(_weights(m) for m in linears.values()),
            layers=len(blocks),
            width=embedding.embedding_dim,
            vocabulary=embedding.num_embeddings,
            block=BlockSize(**{f.name: max(getattr(b, f.name) for b in blocks) for f in fields(BlockSize)}),
        )


def _blocks(model: Any, grids: Mapping[str, Grid]) -> list[BlockSize]:
    prefix, items = block_list(model)
    inside: list[dict[str, Grid]] = [{} for _ in items]
    for name, grid in grids.items():
        if name.startswith(f"{prefix}."):
            index, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            inside[int(index)][rest] = grid
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    return [BlockSize.of(block, own, chosen) for block, own in zip(items, inside, strict=True)]


def _quantized(linears: Mapping[str, Any], grids: Mapping[str, Grid]) -> tuple[int, int, int]:
    """Weights of the linears that have a grid, bytes of their codes in memory, number of their scales."""
    sizes = {name: _weights(linears[name]) for name in grids}
    stored = sum(n if grids[name].bits == 8 else n // 2 for name, n in sizes.items())
    scales = sum(linears[name].out_features * grid.groups(linears[name].in_features) for name, grid in grids.items())
    return sum(sizes.values()), stored, scales


def _weights(linear: Any) -> int:
    return int(linear.weight.numel())


def _inputs_outputs(block: nn.Module, linears: Mapping[str, Any], chosen: int | None) -> int:
    """Widths of a block's linears and of its stacked experts; of experts as many as a token is routed to."""
    share = {
        f"{name}.": min(1.0, (chosen or module.count) / module.count)
        for name, module in block.named_modules()
        if isinstance(module, SplitExperts)
    }
    widths = [
        (m.in_features + m.out_features) * next((s for begin, s in share.items() if name.startswith(begin)), 1.0)
        for name, m in linears.items()
    ]
    stacked = [
        min(chosen or len(p), len(p)) * sum(p.shape[1:])
        for module in block.modules()
        for p in module._parameters.values()
        if p is not None and p.ndim == 3 and not isinstance(module, nn.Conv1d)
    ]
    return round(float(sum(widths) + sum(stacked)))

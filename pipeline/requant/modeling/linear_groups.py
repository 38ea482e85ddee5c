"""Groups of linears that share an input tensor, found from one forward of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from requant.errors import StageError
from requant.modeling.block_walk import BlockInput, Walk


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a block (names inside it) that share their input, such as q, k and v."""

    linears: tuple[str, ...]


Inputs = Iterator[tuple[Tensor, Tensor | None]]
"""The batches' (input of a group, input in the unquantized model or None), each [batch, length, in]."""
OnGroup = Callable[[LinearGroup, Inputs], None]
"""Called once a group with the inputs of all batches; it may replace the weights of the group's linears."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRun:
    """One block, the batches that run through it, and what is done at each group.

    reference_block: the block with its original weights, for the batches that also run unquantized.
    """

    walk: Walk
    block: nn.Module
    reference_block: nn.Module | None
    items: Sequence[BlockInput]
    arguments: Sequence[Any]  # of the block besides hidden states, by batch
    groups: Sequence[LinearGroup]
    on_group: OnGroup


def find_linear_groups(walk: Walk, index: int, item: BlockInput, linears: Sequence[str]) -> list[LinearGroup]:
    """Group `linears` of a block by the input they receive, in call order, from one batch.

    Raises StageError when a linear is not called: nothing would be known about its input.
    """
    block = walk.blocks[index]
    groups: dict[tuple[int, ...], list[str]] = {}
    keep: list[Tensor] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            keep.append(args[0])  # alive until the end, so that no address is used twice
            same = (args[0].data_ptr(), args[0]._version) if args[0].numel() else (id(args[0]),)  # no rows, no address
            groups.setdefault(same, []).append(name)

        return hook

    handles = [block.get_submodule(n).register_forward_pre_hook(watch(n)) for n in linears]
    try:
        walk.run(index, item)
    finally:
        for handle in handles:
            handle.remove()
    called = {n for group in groups.values() for n in group}
    if called != set(linears):
        raise StageError(
            f"{walk.prefix}.{index}: {', '.join(sorted(set(linears) - called))} was never called "
            "on the calibration text: leave in 16 bit what text does not reach (quantize.overrides, skip: true)"
        )
    return [LinearGroup(tuple(dict.fromkeys(names))) for names in groups.values()]


def comparable_rows(x: Tensor, unquantized: Tensor | None) -> Tensor | None:
    """The rows of the unquantized input that belong to `x`: an expert's own rows come later."""
    return None if unquantized is None else unquantized[: len(x)]

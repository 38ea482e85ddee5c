"""All batches of a block to one group of linears before any batch continues.

The algorithm, for each group in call order: run every batch through the block up to the group, give the inputs there to
`on_group`, which may replace the group's weights. Each group so receives what the replaced weights before it produce.
At the end the whole block runs once more and gives the next hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from requant.errors import StageError
from requant.modeling.block_walk import BlockInput, Walk
from requant.modeling.linear_groups import BlockRun, Inputs, LinearGroup, OnGroup, comparable_rows
from requant.modeling.moe import unfollow
from requant.modeling.paused_batches import run_paused


def run_block(
    walk: Walk,
    index: int,
    items: Sequence[BlockInput],
    groups: Sequence[LinearGroup],
    on_group: OnGroup,
    *,
    reference_block: nn.Module | None = None,
    paused: bool = True,
) -> None:
    """Run one block on every batch, group by group; `hidden` becomes the block's output.

    on_group(group, inputs): called once a group with an iterator over the batches' (input, unquantized input), each
    [batch, length, in]; an expert's inputs are [rows, in] (`moe.SplitExperts`). `reference_block` runs on the batches
    that have `unquantized` and gives their unquantized inputs; for the others, and without it, that input is None.

    paused: each batch's forward pauses at the group with all that it has in memory, and nothing runs twice
    (`paused_batches`). Otherwise each group runs the block again from its start: about twice the work, but no memory
    beyond a batch's, and hidden states may be in host memory.
    """
    run = BlockRun(
        walk=walk,
        block=walk.blocks[index],
        reference_block=reference_block,
        items=items,
        arguments=[item.arguments[index] for item in items],
        groups=groups,
        on_group=on_group,
    )
    if paused and groups:
        run_paused(run)
    else:
        _run_again_for_each_group(run)


def _run_again_for_each_group(run: BlockRun) -> None:
    """Run the block again from its start for each group (the module's docstring)."""
    walk, items, reference = run.walk, run.items, run.reference_block

    def inputs(group: LinearGroup) -> Inputs:
        hidden = walk.states.take([item.hidden for item in items])
        unquantized = walk.states.take(
            [i.unquantized for i in items if reference is not None and i.unquantized is not None]
        )
        for item, start, other in zip(items, hidden, run.arguments, strict=True):
            x = _input_of(run.block, start, other, group)  # first: the reference block's experts take the same rows
            was = None
            if reference is not None and item.unquantized is not None:
                was = _input_of(reference, next(unquantized), other, group)
            yield x, comparable_rows(x, was)

    for group in run.groups:
        run.on_group(group, inputs(group))
    if reference is not None:
        unfollow(reference)
        pass_on(walk, reference, items, run.arguments, unquantized=True)
    pass_on(walk, run.block, items, run.arguments)


def pass_on(
    walk: Walk, block: nn.Module, items: Sequence[BlockInput], arguments: Sequence[Any], *, unquantized: bool = False
) -> None:
    """Run a block on every batch; its output becomes `hidden`, or `unquantized`."""
    chosen = [(i, a) for i, a in zip(items, arguments, strict=True) if not unquantized or i.unquantized is not None]
    kept = [item.unquantized if unquantized else item.hidden for item, _ in chosen]
    for (item, other), x in zip(chosen, walk.states.take([k for k in kept if k is not None]), strict=True):
        out = Walk.forward(block, x, other)
        if unquantized:
            item.unquantized = walk.states.put(out, item.unquantized)
            item.unquantized_passed += 1
        else:
            item.hidden = walk.states.put(out, item.hidden)
            item.passed += 1


def start_unquantized(walk: Walk, items: Sequence[BlockInput]) -> None:
    """Start the unquantized run of these batches, which have passed no block."""
    for item in items:
        item.unquantized = walk.states.put(item.hidden.to(walk.device))


class _GroupReached(Exception):
    """Ends a forward at a group."""


def _input_of(block: nn.Module, hidden: Tensor, arguments: Any, group: LinearGroup) -> Tensor:
    """The input of a group's linears, from a forward that ends there."""
    caught: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])
        raise _GroupReached

    handle = block.get_submodule(group.linears[0]).register_forward_pre_hook(hook)
    try:
        Walk.forward(block, hidden, arguments)
    except _GroupReached:
        pass
    finally:
        handle.remove()
    if not caught:
        raise StageError(f"{group.linears[0]} was not called on every batch of the calibration text")
    return caught[0]

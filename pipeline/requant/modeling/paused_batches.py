"""All batches through a block in one forward each, paused at every group of linears.

Each batch's forward is a greenlet, a call stack of its own. A hook on the first linear of each group switches back to
the caller with that linear's input, and the forward continues at that point when the caller switches to it again:

    batch 0   norm ─┤ pause at q,k,v ├─ attention ─┤ pause at o ├─ ... ─ output
    batch 1   norm ─┤ pause at q,k,v ├─ attention ─┤ pause at o ├─ ... ─ output
    caller          └ solve q,k,v ───┘              └ solve o ──┘

All activations that a forward holds stay in memory while it is paused (`quantize.memory` estimates them).
`sequential` has the same result without this memory, by running the block again for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from requant.errors import StageError
from requant.modeling.block_walk import Walk
from requant.modeling.linear_groups import BlockRun, Inputs, LinearGroup, comparable_rows


def run_paused(run: BlockRun) -> None:
    """Run all batches to one group, call `on_group`, continue; `hidden` becomes the output."""
    alive = [True]
    blocks = [m for m in (run.block, run.reference_block) if m is not None]
    handles = [h for m in blocks for h in _pausing_hooks(m, run.groups, alive)]
    forwards = [greenlet(Walk.forward) for _ in run.items]
    references = [
        greenlet(Walk.forward) if run.reference_block is not None and item.unquantized is not None else None
        for item in run.items
    ]

    def inputs(group: LinearGroup, *, starting: bool) -> Inputs:
        """The batches' inputs of a group. starting: the forwards start now, with their arguments."""
        for forward, reference, item, other in zip(forwards, references, run.items, run.arguments, strict=True):
            x = _continue(forward, (run.block, item.hidden, other) if starting else (), group)
            unquantized = None
            if reference is not None:
                unquantized = _continue(
                    reference, (run.reference_block, item.unquantized, other) if starting else (), group
                )
            yield x, comparable_rows(x, unquantized)

    try:
        for position, group in enumerate(run.groups):
            run.on_group(group, inputs(group, starting=position == 0))
        for forward, reference, item in zip(forwards, references, run.items, strict=True):
            item.hidden = run.walk.states.put(forward.switch())
            item.passed += 1
            if reference is not None:
                item.unquantized = run.walk.states.put(reference.switch())
                item.unquantized_passed += 1
    finally:
        alive[0] = False
        for handle in handles:
            handle.remove()


def _pausing_hooks(block: nn.Module, groups: Sequence[LinearGroup], alive: list[bool]) -> list[Any]:
    """Hooks that pause a forward at each group's first linear and hand its input to the caller.

    alive: [False] once the run is over: a forward that is garbage-collected runs to its end without pausing.
    """

    def pause(group: LinearGroup) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            parent = getcurrent().parent
            if alive[0] and parent is not None:
                parent.switch(group, args[0])

        return hook

    return [block.get_submodule(g.linears[0]).register_forward_pre_hook(pause(g)) for g in groups]


def _continue(forward: Any, arguments: tuple[Any, ...], expected: LinearGroup) -> Tensor:
    """Run one batch to its next pause, which must be at `expected`: the input there."""
    group, inputs = forward.switch(*arguments)
    if group is not expected:
        raise StageError(f"batches call their linears in different orders: {group.linears} before {expected.linears}")
    result: Tensor = inputs
    return result

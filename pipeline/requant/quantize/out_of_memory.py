"""When memory runs out while a model is quantized: the same block again from its inputs, in ways that take less.

First nothing waits inside a block any more and hidden states go to the host; then batches are halved, down to one window.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence

import torch
from torch import nn

from requant.errors import StageError
from requant.modeling.block_walk import BlockInput, Walk
from requant.modeling.hidden_state_store import Shelf
from requant.modeling.moe import unfollow
from requant.modeling.sequential import pass_on
from requant.runtime.device import free_memory

log = logging.getLogger(__name__)


class Lean:
    """How a walk is being done. hold: batches wait inside a block. notes: what went otherwise than begun, for the report."""

    def __init__(self, walk: Walk, notes: list[str]) -> None:
        self.walk, self.notes, self.hold = walk, notes, not walk.shelf.on_host

    def less(self, index: int, items: list[BlockInput], held_from: int | None) -> int | None:
        """Take less memory from here on; `items` are changed in place. Returns the first held-out batch as it is counted now.

        Raises StageError when there is nothing left to give up.
        """
        gc.unfreeze()  # what was set aside may be garbage by now
        free_memory(self.walk.device)
        where = f"{self.walk.prefix}.{index}: out of memory"
        largest = max(len(item.hidden) for item in items)
        if self.hold:
            self.hold = False
            self._to_host(items)
            self._note(f"{where} with {len(items)} batches waiting inside a block, went on with one at a time")
            return held_from
        if largest == 1:
            raise StageError(
                f"{where} on {self.walk.device} with one window at a time: shorten calibration.length; the same command goes on "
                "with this block"
            )
        before = None if held_from is None else sum(len(i.hidden) for i in items[:held_from])
        items[:] = self.walk.halved(items)
        self._note(f"{where} with {largest} windows at a time, went on with {max(len(i.hidden) for i in items)}")
        return None if before is None else _position(items, before)

    def _to_host(self, items: Sequence[BlockInput]) -> None:
        if self.walk.device.type != "cuda":
            return
        self.walk.shelf = Shelf(self.walk.device, on_host=True)
        for item in items:
            item.hidden = self.walk.shelf.put(item.hidden)
            item.exact = None if item.exact is None else self.walk.shelf.put(item.exact)
        torch.cuda.synchronize(self.walk.device)
        free_memory(self.walk.device)

    def _note(self, text: str) -> None:
        log.warning("%s", text)
        self.notes.append(text)


def follow(walk: Walk, block: nn.Module, twin: nn.Module | None, index: int, items: Sequence[BlockInput]) -> bool:
    """Take the batches that have not come through a solved block through it; False when memory runs out again."""
    if twin is not None:
        unfollow(twin)
    behind = [i for i in items if i.exact is not None and i.exact_passed == index]
    left = [i for i in items if i.passed == index]
    try:
        if twin is not None:
            pass_on(walk, twin, behind, [i.arguments[index] for i in behind], exact=True)
        pass_on(walk, block, left, [i.arguments[index] for i in left])
    except torch.OutOfMemoryError:
        return False
    return True


def _position(items: Sequence[BlockInput], windows: int) -> int:
    """The number of batches that hold the first so many windows."""
    seen = 0
    for number, item in enumerate(items):
        if seen >= windows:
            return number
        seen += len(item.hidden)
    return len(items)

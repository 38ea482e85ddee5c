"""Out-of-memory recovery: restart the block without paused batches, then with halved ones."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence

import torch
from torch import nn

from requant.errors import StageError
from requant.modeling.block_walk import BlockInput, Walk
from requant.modeling.hidden_state_store import HiddenStateStore
from requant.modeling.moe import unfollow
from requant.modeling.sequential import pass_on
from requant.quantize.calibration_plan import CalibrationPlan
from requant.runtime.device import free_memory

log = logging.getLogger(__name__)


class OutOfMemoryRecovery:
    """Turns a walk's batches into those of a leaner plan. notes: what changed, for the report."""

    def __init__(self, walk: Walk, notes: list[str]) -> None:
        self.walk, self.notes = walk, notes

    def leaner(self, plan: CalibrationPlan, index: int, items: list[BlockInput]) -> CalibrationPlan:
        """The plan to restart block `index` with; `items` become its batches, in place.

        Raises StageError when no plan takes less.
        """
        gc.unfreeze()  # what was excluded from collection may be garbage by now
        free_memory(self.walk.device)
        where = f"{self.walk.prefix}.{index}: out of memory"
        leaner = plan.leaner()
        if leaner is None:
            raise StageError(
                f"{where} on {self.walk.device} with one window at a time: shorten calibration.length; the same "
                "command goes on with this block"
            )
        if plan.inside_block:
            self._to_host(items)
            self._note(f"{where} with {len(items)} batches waiting inside a block, went on with one at a time")
        else:
            items[:] = self.walk.halved(items)
            self._note(f"{where} with {max(plan.batches)} windows at a time, went on with {max(leaner.batches)}")
        return leaner

    def _to_host(self, items: Sequence[BlockInput]) -> None:
        if self.walk.device.type != "cuda":
            return
        self.walk.states = HiddenStateStore(self.walk.device, on_host=True)
        for item in items:
            item.hidden = self.walk.states.put(item.hidden)
            item.unquantized = None if item.unquantized is None else self.walk.states.put(item.unquantized)
        torch.cuda.synchronize(self.walk.device)
        free_memory(self.walk.device)

    def _note(self, text: str) -> None:
        log.warning("%s", text)
        self.notes.append(text)


def follow(
    walk: Walk, block: nn.Module, reference_block: nn.Module | None, index: int, items: Sequence[BlockInput]
) -> bool:
    """Run the batches that have not passed a solved block through it; False: out of memory."""
    if reference_block is not None:
        unfollow(reference_block)
    behind = [i for i in items if i.unquantized is not None and i.unquantized_passed == index]
    left = [i for i in items if i.passed == index]
    try:
        if reference_block is not None:
            pass_on(walk, reference_block, behind, [i.arguments[index] for i in behind], unquantized=True)
        pass_on(walk, block, left, [i.arguments[index] for i in left])
    except torch.OutOfMemoryError:
        return False
    return True

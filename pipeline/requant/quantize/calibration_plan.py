"""Which calibration batches wait where, which also run unquantized, which are held out.

Computed once before the walk. A walk that runs out of memory goes on with `CalibrationPlan.leaner()`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from requant.modeling.block_walk import Walk, larger_half
from requant.modeling.blocks import kinds
from requant.modeling.moe import split_experts
from requant.quantize import memory
from requant.quantize.plan import Settings
from requant.runtime.device import profile_of, reserve_memory
from requant.runtime.ranks import Ranks

HELD_OUT_SHARE = 8  # one in so many batches judges the column order, the others make the candidates
EXPERTS_BATCH = 4  # times the tokens in a batch where they are routed to experts, of which each gets few


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationPlan:
    """One rank's calibration batches: their sizes, where they wait, what each is used for."""

    share: slice  # of all calibration windows: this rank's
    batches: tuple[int, ...]  # windows in each batch of this rank
    unquantized: tuple[int, ...]  # batches that also run through the unquantized model, to measure the drift of inputs
    first_held_out: int | None  # the first batch that judges the column order; None: no batch does
    inside_block: bool  # batches pause inside a block at each group of linears; False: each group runs the block again
    waiting_bytes: int  # GPU memory of batches that pause inside a block; 0 where nothing needs reserving

    @property
    def on_host(self) -> bool:
        """Whether hidden states of a GPU's batches wait in host memory."""
        return not self.inside_block

    def reserve(self, device: torch.device) -> None:
        """Reserve the GPU memory of paused batches as one block.

        Allocated piece by piece it takes longer and fragments.
        """
        if self.waiting_bytes:
            reserve_memory(device, self.waiting_bytes)

    def leaner(self) -> CalibrationPlan | None:
        """The plan that takes less memory; None when no plan does.

        First without paused batches, then with each batch halved.
        """
        if self.inside_block:
            return replace(self, inside_block=False, waiting_bytes=0)
        if max(self.batches) == 1:
            return None
        parts = [_halves(count) for count in self.batches]
        starts = [sum(map(len, parts[:i])) for i in range(len(parts) + 1)]
        return replace(
            self,
            batches=tuple(count for halves in parts for count in halves),
            unquantized=tuple(n for i in self.unquantized for n in range(starts[i], starts[i + 1])),
            first_held_out=None if self.first_held_out is None else starts[self.first_held_out],
        )


def plan_calibration(
    walk: Walk, windows: Tensor, settings: Settings, ranks: Ranks, *, batch: int | None = None
) -> CalibrationPlan:
    """The plan of this rank for `windows`, int64 [n, length]; every rank makes this call.

    batch: windows in a batch, by default `batch_size`. No memory is reserved.
    """
    size = batch or batch_size(walk.device, windows, walk.blocks)
    share = ranks.share(len(windows))
    every = memory.unquantized_every(walk, windows) if settings.correct else 0
    own, twice = windows[share].numel(), 1 / every if every else 0.0
    limit = memory.MEMORY_SHARE if ranks.count == 1 else memory.MEMORY_SHARE_OF_RANKS
    inside = ranks.all(memory.fits_inside_block(walk, own, twice, limit))
    firsts = range(share.start, share.stop, size)
    numbers = [first // size for first in firsts]  # among the batches of a rank that has all windows
    judged = settings.order == "auto" and not settings.sweeps  # after sweeps the order makes no difference
    return CalibrationPlan(
        share=share,
        batches=tuple(min(size, share.stop - first) for first in firsts),
        unquantized=tuple(i for i, n in enumerate(numbers) if every and n % every == 0),
        first_held_out=_first_held_out(-(-len(windows) // size), numbers) if judged else None,
        inside_block=inside,
        waiting_bytes=memory.waiting_bytes(walk, own, twice) if inside and walk.device.type == "cuda" else 0,
    )


def batch_size(device: torch.device, windows: Tensor, blocks: Iterable[nn.Module] = ()) -> int:
    """Calibration windows in a batch, where the recipe does not say: as many as fill the device.

    windows: int64 [n, length], of all ranks. blocks: of the model. With experts a batch is larger by EXPERTS_BATCH,
    as long as HELD_OUT_SHARE batches remain: every expert is called for every batch, on the rows routed to it.
    """
    size = max(1, profile_of(device).batch_tokens // windows.shape[1])
    if any(True for block in kinds(blocks) for _ in split_experts(block)):
        return max(size, min(EXPERTS_BATCH * size, len(windows) // HELD_OUT_SHARE))
    return size


def _first_held_out(batches: int, numbers: list[int]) -> int | None:
    """The first held-out batch of this rank; None: no batch is held out.

    batches: of all ranks together. numbers: those of this rank's batches among them.
    """
    first = batches - max(1, batches // HELD_OUT_SHARE)
    return sum(n < first for n in numbers) if batches > 1 else None


def _halves(count: int) -> tuple[int, ...]:
    """The sizes that `Walk.halved` splits a batch of `count` windows into."""
    half = larger_half(count)
    return (half, count - half) if count > half else (half,)

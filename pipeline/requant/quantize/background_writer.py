"""Writes finished blocks on background threads (rank 0 only).

Each finished block is a resume point once it is on disk. Its tensors are copied to the host before the block after the
next is finished; the disk may be a few blocks behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from requant.checkpoint.journal import Journal
from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.writer import CheckpointWriter
from requant.formats.quantized_format import QuantizedFormat
from requant.numerics.solution import Solution
from requant.quantize.module_results import ModuleRow
from requant.quantize.plan import Plan, convert
from requant.runtime.pinned_memory import PinnedBuffer, use_stream

JOURNAL = "blocks.json"
BEHIND = 4  # finished blocks that may not be on disk yet: at first the embeddings are written too


class SideStream:
    """A CUDA stream for a writing thread, whose work waits until a tensor is solved."""

    def __init__(self) -> None:
        self.stream: Any = None

    def solved(self, tensor: Tensor) -> Any:
        """The event that `once` waits for; called by the thread that solves."""
        if not tensor.is_cuda:
            return None
        self.stream = self.stream or torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        return torch.cuda.current_stream(tensor.device).record_event()

    @contextmanager
    def once(self, solved: Any) -> Iterator[None]:
        """Context on the side stream after `solved`; called by the writing thread.

        All tensors made inside must be copied to the host at its end.
        """
        if solved is None:
            yield
            return
        with use_stream(self.stream):
            self.stream.wait_event(solved)
            yield


class BlockWriter:
    """The interface of `BackgroundWriter` for other ranks than the first: it writes nothing."""

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def finished(self) -> list[list[ModuleRow]]:
        """Results of the blocks that are complete on disk, also those of an interrupted run."""
        return []

    def resume(self, index: int) -> None:
        """Mark block `index`, a finished one, as written."""

    def read(self, module: str, bits: int) -> Tensor:
        """The weight of a finished module as servers dequantize it, fp32 [rows, n]."""
        raise NotImplementedError("only the first rank reads what was written")

    def put(self, module: str, solution: Solution) -> None:
        """Start to pack and write a solved module's tensors."""

    def end(self, index: int) -> None:
        """Start to write the rest of block `index`; later tensors belong to the next one."""

    def commit(self, index: int, results: Sequence[ModuleRow]) -> None:
        """Add block `index`, the oldest that has ended, to the journal once it is on disk."""

    def settle(self, behind: int = 0) -> None:
        """Wait until committed blocks left the device and all but the last `behind` are on disk."""

    def close(self) -> None:
        """Finish the files, after the tensors outside of the blocks are written too."""


class BackgroundWriter(BlockWriter):
    """Writes the checkpoint `path`, resuming what it holds. modules: by their stored names."""

    def __init__(self, path: Path, plan: Plan, source: Checkpoint, *, max_bytes: int) -> None:
        self.plan, self.source = plan, source
        self.journal = Journal(path / JOURNAL)
        self.writer = CheckpointWriter(path, plan.slots, max_bytes=max_bytes, resume=bool(self.journal.blocks))
        self.journal.keep_whole(self.writer, plan.block_slots)
        self.slots = {s.name: s for s in plan.slots}
        self.disk, self.side_stream, self.staging = ThreadPoolExecutor(1), SideStream(), PinnedBuffer()
        self.syncing, self.outside_pool = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.writing: list[Future[None]] = []  # of the block being solved
        self.ended: list[list[Future[None]]] = []
        self.written: list[Future[None]] = []  # of blocks that are committed
        self.committed: list[Future[None]] = []
        # The tensors outside of the blocks are large: written while blocks are solved, and no block waits for them.
        inside = {n for names in plan.block_slots for n in names}
        self.outside = self.outside_pool.submit(self._write_rest, [n for n in self.slots if n not in inside])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.disk.shutdown()  # first: what was solved is committed even when the walk is stopped
        self.syncing.shutdown()
        self.outside_pool.shutdown()
        self.writer.abandon()

    def finished(self) -> list[list[ModuleRow]]:
        return cast(list[list[ModuleRow]], list(self.journal.blocks))

    def resume(self, index: int) -> None:
        self.writer.mark_written(self.plan.block_slots[index])

    def read(self, module: str, bits: int) -> Tensor:
        layout = self.plan.format
        names = {s: f"{module}.{s}" for s in layout.suffixes if f"{module}.{s}" in self.slots}
        return layout.dequantize({s: self.writer.read(name) for s, name in names.items()}, bits)

    def put(self, module: str, solution: Solution) -> None:
        self._submit(self._write_packed, module, solution, self.side_stream.solved(solution.codes))

    def end(self, index: int) -> None:
        self._submit(self._write_rest, self.plan.block_slots[index])
        self.ended.append(self.writing)
        self.writing = []

    def commit(self, index: int, results: Sequence[ModuleRow]) -> None:
        writing = self.ended.pop(0)
        rows, slots = [dict(r) for r in results], self.plan.block_slots[index]
        whole = self.syncing.submit(self.journal.commit, index, self.writer, writing, rows, slots)
        self.committed.append(whole)
        self.written += writing

    def settle(self, behind: int = 0) -> None:
        if self.outside.done():
            self.outside.result()  # if that failed, the run cannot finish
        while self.written:
            self.written.pop(0).result()
        while self.committed and (len(self.committed) > behind or self.committed[0].done()):
            self.committed.pop(0).result()

    def close(self) -> None:
        self.settle()
        self.outside.result()
        self.writer.close()

    def _submit(self, work: Callable[..., None], *args: Any) -> None:
        self.writing.append(self.disk.submit(work, *args))

    def _write_packed(self, module: str, solution: Solution, solved: Any) -> None:
        with self.side_stream.once(solved):
            for suffix, tensor in _packed(solution, self.plan.format).items():
                self.writer.write(f"{module}.{suffix}", self.staging.to_host(tensor))

    def _write_rest(self, names: Sequence[str]) -> None:
        """Tensors that are not quantized, in the serving dtype."""
        for name in names:
            if name in self.source:
                self.writer.write(name, convert(name, self.source.read(name), self.slots[name].dtype))


def _packed(solution: Solution, layout: QuantizedFormat) -> dict[str, Tensor]:
    scale, zero, grid = solution.scales.scale, solution.scales.zero, solution.grid

    def pack(codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        return layout.pack(codes, scale, zero, grid.bits, symmetric=grid.symmetric)

    try:
        return pack(solution.codes, scale, zero)
    except torch.OutOfMemoryError:  # paused batches may hold all memory
        return pack(solution.codes.cpu(), scale.cpu(), zero.cpu())

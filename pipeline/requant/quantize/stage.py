"""Stage: calibrate and solve block by block, and write a GPTQ checkpoint.

One block is resident. Each finished block is written while the next are solved, and is a resume point: a killed run
replays the finished blocks from their own files and continues with the same numbers. Several ranks share the windows,
and the rows of what is solved; each holds every block.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint.atomic_write import make_directory, remove
from requant.checkpoint.pieces import PiecewiseCheckpoint
from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.modeling import sequential, skeleton
from requant.modeling.block_walk import BlockInput, Walk
from requant.modeling.fused_ops import FusedOps
from requant.modeling.hidden_state_store import HiddenStateStore
from requant.numerics.delta_retention import Deltas
from requant.quantize.background_writer import BEHIND, JOURNAL, BackgroundWriter, BlockWriter
from requant.quantize.block_quantizer import Quantizer
from requant.quantize.calibration_plan import plan_calibration
from requant.quantize.gptq_files import write_small_files
from requant.quantize.module_results import ModuleResult
from requant.quantize.plan import Plan, Settings, plan
from requant.quantize.warmup import WarmUp, narrowest
from requant.runtime.device import compute_dtype, profile_of
from requant.runtime.interpreter import gpu_interpreter_settings
from requant.runtime.ranks import SINGLE_PROCESS, Ranks

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]


@torch.no_grad()
def quantize(
    source: str | Path, out: str | Path, windows: Tensor, settings: Settings, *,
    dtype: torch.dtype, device: torch.device,
    batch: int | None = None, trust_remote_code: bool = False, max_shard: int = 5 * 10**9,
    meta: Mapping[str, Any] | None = None, deltas: Deltas | None = None, progress: Progress | None = None,
    ranks: Ranks = SINGLE_PROCESS, notes: list[str] | None = None, keep_journal: bool = False,
) -> tuple[Plan, list[ModuleResult]]:  # fmt: skip
    """Quantize the model in `source` into the directory `out`, resuming what it holds.

    windows: calibration token ids, int64 [n, length]. dtype: of the tensors left unquantized (what servers run in); a
    GPU computes in it, a CPU in fp32. batch: windows at a time, by default about 2048 tokens on the CPU, 8192 on a GPU.
    deltas: what an adapter added to the weights of `source`, to measure how much of it is retained. notes: gets a line
    for each change of plan, such as smaller batches when memory runs out. keep_journal: leave the file by
    which a killed run resumes, for a caller that verifies first.
    `out` must belong to the same source, windows and settings: the caller names it after their digest.
    With several ranks each makes this call (`Ranks.call`). Only the first needs deltas, writes and reports progress.
    """
    source, out = Path(source), Path(out)
    make_directory(out)
    device = check_ranks(len(windows), device, ranks)
    whole = Checkpoint(source)
    model = skeleton.open_model(source, trust_remote_code=trust_remote_code, split=True)
    layout = plan(whole, model, settings, dtype, where=source)
    checkpoint = PiecewiseCheckpoint(whole, layout.pieces)
    ranks.connect(device)
    walk = Walk(checkpoint, model, device=device, dtype=compute_dtype(device, dtype))
    calibration = plan_calibration(walk, windows, settings, ranks, batch=batch)
    calibration.reserve(device)
    walk.states = HiddenStateStore(device, on_host=calibration.on_host)
    with (
        gpu_interpreter_settings(device),
        FusedOps(walk.blocks, device, walk.dtype) as passes,
        WarmUp(device, narrowest(model, layout), settings, dtype, later=passes.try_out) as warming,
        BackgroundWriter(out, layout, checkpoint, max_bytes=max_shard) if ranks.first else BlockWriter() as output,
    ):
        items = walk.embed_all(torch.split(windows[calibration.share], list(calibration.batches)))
        sequential.start_unquantized(walk, [items[i] for i in calibration.unquantized])
        with Quantizer(
            walk, layout, settings, output, ranks, calibration=calibration, deltas=deltas, notes=notes, warming=warming
        ) as quantizer:
            _walk(quantizer, items, progress, passes)
        output.close()
    if ranks.first:
        damp = min((m.damp for m in quantizer.results), default=0.01)
        write_small_files(source, out, layout, settings, dtype=dtype, damp=damp, meta=meta or {})
        if not keep_journal:
            remove(out / JOURNAL)
    return layout, quantizer.results


def check_ranks(windows: int, device: torch.device, ranks: Ranks) -> torch.device:
    """This rank's own device; raises InputError for fewer calibration windows than ranks."""
    if windows < ranks.count:
        raise InputError(
            f"{windows} calibration windows cannot be split over {ranks.count} ranks: start fewer, or raise "
            "calibration.samples"
        )
    return ranks.device_of(device)


def _walk(quantizer: Quantizer, items: list[BlockInput], progress: Progress | None, passes: FusedOps) -> None:
    """Quantize every block, or replay those that an earlier run finished.

    Progress counts blocks on disk. `passes` are used from the second block on, even if they are compiled earlier: a run
    that resumes must compute the same numbers.
    """
    output, count = quantizer.output, len(quantizer.walk)
    finished = quantizer.ranks.broadcast(output.finished())
    started, reported = time.monotonic(), 0

    def report(done: int) -> None:
        nonlocal reported
        if progress and done > reported:
            reported, since = done, (time.monotonic() - started) / max(done - len(finished), 1)
            progress(done, count, f"{since:.1f} s a block")

    for index in range(count):
        if index == 1:
            if quantizer.warming:
                quantizer.warming.wait_all()
            passes.use()
        if index < len(finished):
            quantizer.replay(index, items)
            quantizer.results += [ModuleResult(**m) for m in finished[index]]
            report(index + 1)
        else:
            quantizer.block(index, items)
            output.settle(BEHIND)
            report(max(index - BEHIND, len(output.finished())))
            if not profile_of(quantizer.walk.device).commits_later:
                quantizer.commit_block()
    quantizer.commit_block()
    output.settle()
    report(count)

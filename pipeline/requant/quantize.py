"""Stage: block by block calibrate, solve, replace, carry on, write a GPTQ checkpoint.

One block is resident. Each finished block is on disk before the next begins, and is a resume point: a killed run
replays the finished blocks from their own files and goes on with the same numbers.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from requant import gptq, kernels, pack, skeleton
from requant.blocks import BlockInput, Walk, block_linears
from requant.checkpoint import Checkpoint
from requant.errors import StageError
from requant.grid import Grid
from requant.hessian import Moments, gather
from requant.layout import Plan, Settings, convert, plan, write_small_files
from requant.linears import calibrate_experts, share_added
from requant.shelf import Shelf
from requant.stages import Stage, find_stages, may_wait, pass_on, step
from requant.survival import Deltas, survival
from requant.writer import CheckpointWriter, Journal

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
JOURNAL = "blocks.json"
EXACT_TOKENS = 8  # for each input of the widest linear also run unquantized, to know what earlier layers lost
TOKENS = {"cpu": 2048, "cuda": 8192}  # of a batch: enough to fill the processor, little to hold
HELD_SHARE = 8  # one in so many batches judges the column order, the others make the candidates


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """What quantizing one linear cost on the calibration text, against the weight it was solved for.

    loss: tr(E H E'). relative_error: sqrt(tr(E H E') / tr(W H W')). With `correct`, W is the corrected weight: what it makes
    up for is not counted as an error. rtn_error: the same for rounding W to nearest on min-max scales.
    added: share of an expert's calibration rows that were not routed to it, because too few were.
    The rest, of the adapter's delta against the same error, is described in `survival`; None without a delta.
    """

    name: str
    bits: int
    group_size: int
    loss: float
    relative_error: float
    rtn_error: float
    damp: float
    order: str
    fallback: bool
    delta_norm: float | None = None
    signal: float | None = None
    signal_to_noise: float | None = None
    retention: float | None = None
    output_retention: float | None = None
    added: float = 0.0


class Quantizer:
    """The walk over one model; holds what every block needs. Use `quantize`."""

    def __init__(
        self, walk: Walk, plan: Plan, settings: Settings, writer: CheckpointWriter, size: tuple[int, int],
        deltas: Deltas, disk: Executor,
    ) -> None:  # fmt: skip
        """size: calibration tokens, and the batches they come in. deltas: by the name of the tensor in the checkpoint.

        disk: one thread, which writes what is finished while the next is solved.
        """
        self.walk, self.plan, self.settings, self.writer, self.disk = walk, plan, settings, writer, disk
        self.tokens, self.batches = size
        self.deltas = deltas
        self.writing: list[Future[None]] = []
        self.unread: list[tuple[str, gptq.Solution, Mapping[str, Any]]] = []
        self.stages: dict[tuple[str, ...], list[Stage]] = {}
        self.results: list[ModuleResult] = []

    def block(self, index: int, items: Sequence[BlockInput]) -> None:
        """Quantize one block and write it; `items` come out as the quantized block's output."""
        block = self.walk.load(index)
        prefix = f"{self.walk.prefix}.{index}."
        linears = tuple(n for n in block_linears(block) if prefix + n in self.plan.grids)
        if linears and linears not in self.stages:
            self.stages[linears] = find_stages(self.walk, index, items[0], linears)
        shared = {id(p): p for p in block.parameters()}  # replaced, never changed in place: the twin keeps them
        twin = copy.deepcopy(block, shared) if self.settings.correct else None
        calibrate_experts(block, twin)

        def reach(stage: Stage, inputs: Iterator[tuple[Tensor, Tensor | None]]) -> None:
            self._stage(block, prefix, stage, inputs)

        step(self.walk, index, items, self.stages.get(linears, []), reach, twin=twin, hold=not self.walk.shelf.on_host)
        self._check_finite(prefix)
        self._settle(block, prefix)
        self.writing.append(self.disk.submit(self._write_rest, index))
        self.walk.release(block)

    def replay(self, index: int, items: Sequence[BlockInput]) -> None:
        """Run a block that was finished before an interruption, from its own files."""
        block = self.walk.load(index)
        prefix = f"{self.walk.prefix}.{index}."
        others = [item.arguments[index] for item in items]
        pass_on(self.walk, block, items, others, exact=True)
        for name, linear in block_linears(block).items():
            grid = self.plan.grids.get(prefix + name)
            if grid is not None:
                stored = self._stored(prefix + name)
                tensors = {s: self.writer.read(f"{stored}.{s}") for s in pack.SUFFIXES}
                linear.weight.copy_(pack.dequantize(tensors, grid.bits).to(self.walk.dtype))
        pass_on(self.walk, block, items, others)
        self.walk.release(block)

    def _stored(self, module: str) -> str:
        return self.walk.names[f"{module}.weight"].removesuffix(".weight")

    def _stage(
        self, block: nn.Module, prefix: str, stage: Stage, inputs: Iterator[tuple[Tensor, Tensor | None]]
    ) -> None:
        """Accumulate the stage's Hessian over all batches, solve its linears, put the quantized weights in place."""
        linears: dict[str, Any] = {prefix + name: block.get_submodule(name) for name in stage.linears}
        moments = gather(
            inputs, next(iter(linears.values())).in_features, self.walk.device,
            drifting=bool(self.settings.correct),
            held_from=self.batches - max(1, self.batches // HELD_SHARE) if self._deciding else None,
        )  # fmt: skip
        if not torch.isfinite(moments.hessian.diagonal()).all():
            raise StageError(f"{prefix}{stage.linears[0]}: its calibration inputs hold NaN or infinity")
        like: dict[Grid, list[str]] = {}
        for name in linears:
            like.setdefault(self.plan.grids[name], []).append(name)
        with kernels.tensor_cores():
            stacked = {g: torch.cat([linears[n].weight.float() for n in names]) for g, names in like.items()}
            damp = self._damp(moments.tokens, len(moments.hessian))
            order = self._order(list(stacked.values()), moments, next(iter(like)), damp)
            pulled = {g: w @ moments.drift if moments.drift is not None else None for g, w in stacked.items()}
            hessian = moments.hessian
            del moments  # the drift and the halves are as large as the Hessian
            factors: dict[tuple[str, int], gptq.Factor] = {}
            for grid, names in like.items():
                key = (order, grid.group_size if order == "group" else 0)
                if key not in factors:
                    columns = gptq.column_order(hessian.diagonal(), order, grid.group_size)
                    factors[key] = gptq.factorize(hessian, columns, damp)
                factor = factors[key]
                weight = gptq.correct(stacked.pop(grid), pulled.pop(grid), factor, self.settings.correct)
                self._solve({name: linears[name] for name in names}, weight, hessian, factor, grid, order)

    def _solve(
        self,
        linears: Mapping[str, Any],
        weight: Tensor,
        hessian: Tensor,
        factor: gptq.Factor,
        grid: Grid,
        order: gptq.Order,
    ) -> None:
        """Quantize linears of one input and one grid, stacked in `weight`, and put the results in their places."""
        solution = gptq.quantize_weight(weight, hessian, factor, grid, order=order, sweeps=self.settings.sweeps)
        sizes = [linear.out_features for linear in linears.values()]
        parts = zip(linears.items(), torch.split(weight, sizes), solution.split(sizes), strict=True)
        for (name, linear), wanted, part in parts:
            quantized = part.weight()
            self._keep(name, part, self._survival(name, quantized - wanted, hessian, part))
            linear.weight = nn.Parameter(quantized.to(self.walk.dtype), requires_grad=False)

    def _survival(
        self, name: str, error: Tensor, hessian: Tensor, solution: gptq.Solution
    ) -> Mapping[str, float | None]:
        """What is left of the adapter's delta in one module, {} where it has none."""
        delta = self.deltas(f"{self._stored(name)}.weight")
        return {} if delta is None else asdict(survival(delta.to(error.device), error, hessian, solution.loss))

    @property
    def _deciding(self) -> bool:
        """Whether held-out batches decide the column order; after sweeps there is nothing left to decide."""
        return self.settings.order == "auto" and not self.settings.sweeps and self.batches > 1

    def _damp(self, tokens: int, n: int) -> float:
        """The recipe's damping, or 0.02 with at least 16 tokens for each of `n` inputs, else 0.05."""
        if self.settings.damp is not None:
            return self.settings.damp
        return 0.02 if tokens >= 16 * n else 0.05

    def _order(self, weights: Sequence[Tensor], moments: Moments, grid: Grid, damp: float) -> gptq.Order:
        """The recipe's order; `auto` lets held-out batches decide, unless sweeps follow."""
        asked = self.settings.order
        if asked != "auto":
            return asked
        if moments.halves is None:
            return "activation"
        return gptq.better_order(weights, *moments.halves, grid, ("activation", "group"), damp)

    def _keep(self, name: str, solution: gptq.Solution, adapted: Mapping[str, Any]) -> None:
        """Have one linear's tensors written; what it cost is read at the block's end, where the device is waited for once."""
        self.unread.append((name, replace(solution, codes=solution.codes[:0]), adapted))
        self.writing.append(self.disk.submit(self._write_packed, self._stored(name), solution))

    def _write_packed(self, stored: str, solution: gptq.Solution) -> None:
        scales = solution.scales
        for suffix, tensor in pack.pack(solution.codes, scales.scale, scales.zero, solution.grid.bits).items():
            self.writer.write(f"{stored}.{suffix}", tensor)

    def _settle(self, block: nn.Module, prefix: str) -> None:
        """Turn what the block's linears cost into numbers."""
        for name, done, adapted in self.unread:
            if done.fallback:
                log.warning("%s: rounded without error feedback (damp %.2f)", name, done.damp)
            grid = done.grid
            self.results.append(
                ModuleResult(
                    name, grid.bits, grid.group_size, done.loss, done.relative, done.rtn_relative, done.damp, done.order,
                    done.fallback, **adapted, added=share_added(block, name.removeprefix(prefix)),
                )
            )  # fmt: skip
        self.unread.clear()

    def _check_finite(self, prefix: str) -> None:
        if not self.walk.shelf.all_finite():
            raise StageError(
                f"{prefix.rstrip('.')}: its output holds NaN or infinity on the calibration text ({self.walk.dtype})"
            )

    def _write_rest(self, index: int) -> None:
        """The block's tensors that are not quantized, in the serving dtype."""
        slots = {s.name: s for s in self.plan.slots}
        for name in self.plan.block_slots[index]:
            if name in self.walk.checkpoint:
                self.writer.write(name, convert(name, self.walk.checkpoint.read(name), slots[name].dtype))


@torch.no_grad()
def quantize(
    source: Path, out: Path, windows: Tensor, settings: Settings, *, dtype: torch.dtype, device: torch.device,
    batch: int | None = None, trust_remote_code: bool = False, max_shard: int = 5 * 10**9, meta: Mapping[str, Any] | None = None,
    deltas: Deltas | None = None, progress: Progress | None = None,
) -> tuple[Plan, list[ModuleResult]]:  # fmt: skip
    """Quantize the model in `source` into the existing directory `out`, going on from what `out` already holds.

    windows: calibration token ids, int64 [n, length]. dtype: of the tensors left unquantized (what servers run in).
    batch: windows at a time, by default about 2048 tokens on the CPU and 8192 on a GPU.
    Blocks compute in fp32 on the CPU and in `dtype` on a GPU. deltas: what an adapter added to the weights of `source`,
    to measure what comes through. `out` must belong to the same source, windows and settings: the caller names it after
    their digest.
    """
    checkpoint = Checkpoint(source)
    model = skeleton.build(
        skeleton.load_config(source, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
    )
    layout = plan(checkpoint, model, settings, dtype, where=source)
    walk = Walk(checkpoint, model, device=device, dtype=torch.float32 if device.type == "cpu" else dtype)
    journal = Journal(out / JOURNAL)
    resume = bool(journal.blocks)
    with (
        CheckpointWriter(out, layout.slots, max_bytes=max_shard, resume=resume) as writer,
        ThreadPoolExecutor(1) as disk,  # ends first: what was solved is committed even when the walk is stopped
    ):
        walk.shelf = Shelf(device, on_host=not may_wait(walk, windows.numel()))
        items = walk.embed(windows, batch or max(1, TOKENS[device.type] // windows.shape[1]))
        if settings.correct:
            widest = max(m.in_features for m in block_linears(walk.blocks[0]).values())
            for item in items[:: max(1, round(windows.numel() / (EXACT_TOKENS * widest)))]:
                item.exact = walk.shelf.put(item.hidden.to(device))
        size = (windows.numel(), len(items))
        quantizer = Quantizer(walk, layout, settings, writer, size, deltas or (lambda _: None), disk)
        _walk(quantizer, items, journal, progress)
        inside = {n for names in layout.block_slots for n in names}
        for slot in layout.slots:
            if slot.name not in inside:
                writer.write(slot.name, convert(slot.name, checkpoint.read(slot.name), slot.dtype))
        writer.close()
    damp = min((m.damp for m in quantizer.results), default=0.01)
    write_small_files(source, out, layout, settings, dtype=dtype, damp=damp, meta=meta or {})
    journal.file.unlink(missing_ok=True)
    return layout, quantizer.results


def _walk(quantizer: Quantizer, items: Sequence[BlockInput], journal: Journal, progress: Progress | None) -> None:
    """Quantize every block, or replay it where the journal has it; a block is written while the next is solved.

    Progress counts blocks on disk.
    """
    writer, count = quantizer.writer, len(quantizer.walk)
    finished = list(journal.blocks)
    committed: Future[None] | None = None
    started = time.monotonic()

    def seen(done: int) -> None:
        if progress and done:
            since = (time.monotonic() - started) / max(done - len(finished), 1)
            progress(done, count, f"{since:.1f} s a block")

    for index in range(count):
        if index < len(finished):
            quantizer.replay(index, items)
            quantizer.results += [ModuleResult(**m) for m in finished[index]]
            writer.mark_written(quantizer.plan.block_slots[index])
            seen(index + 1)
        else:
            before = len(quantizer.results)
            quantizer.block(index, items)
            if committed:
                committed.result()
                seen(index)
            results = [asdict(m) for m in quantizer.results[before:]]
            committed = quantizer.disk.submit(journal.commit, writer, quantizer.writing, results)
            quantizer.writing = []
    if committed:
        committed.result()
    seen(count)

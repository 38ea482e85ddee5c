"""Stage: block by block calibrate, solve, replace, carry on, write a GPTQ checkpoint.

One block is resident. Each finished block is written while the next are solved, and is a resume point: a killed run
replays the finished blocks from their own files and goes on with the same numbers. Several ranks share the windows, and
the rows of what is solved; each holds every block.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from requant import skeleton, stages
from requant.blocks import BlockInput, Walk, block_linears
from requant.checkpoint import Checkpoint
from requant.costs import Costs
from requant.elementwise import OnePass
from requant.errors import InputError, NotFiniteError, StageError
from requant.hessian import gather
from requant.layout import Plan, Settings, plan, write_small_files
from requant.leaner import Lean, follow
from requant.linears import calibrate_experts, pool_experts, share_added
from requant.output import BEHIND, JOURNAL, Output, Written
from requant.ranks import ALONE, Ranks
from requant.results import ModuleResult
from requant.solving import Solved, solve_stage
from requant.stages import Inputs, Stage, find_stages, pass_on, step
from requant.survival import Deltas, measure
from requant.warming import Warming, narrowest, quick_switches, set_aside

__all__ = ["JOURNAL", "ModuleResult", "Quantizer", "check_ranks", "quantize"]

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
TOKENS = {"cpu": 2048, "cuda": 8192}  # of a batch: enough to fill the processor, little to hold
LATER = {"cpu": False, "cuda": True}  # whether a block is handed over while the next is at work
HELD_SHARE = 8  # one in so many batches judges the column order, the others make the candidates


class Quantizer:
    """The walk over one model; holds what every block needs. Use `quantize`. Left by an error, it hands over what is solved."""

    def __init__(
        self, walk: Walk, plan: Plan, settings: Settings, output: Output, ranks: Ranks, *, held_from: int | None,
        deltas: Deltas | None, notes: list[str] | None = None, warming: Warming | None = None,
    ) -> None:  # fmt: skip
        """held_from: the first batch that judges the column order, None when none does. deltas: by the tensor's stored name.

        notes: gets what goes otherwise than begun. warming: what is waited for before the first stage is solved.
        """
        self.walk, self.plan, self.settings, self.output, self.ranks = walk, plan, settings, output, ranks
        self.held_from = held_from
        self.deltas = deltas or (lambda _: None)
        self.judging = ranks.tell(deltas is not None)  # the first rank judges: the others have no deltas
        self.costs = Costs()
        self.owed: tuple[int, Costs] | None = None  # the last block, until what it cost is known
        self.stages: dict[tuple[str, ...], list[Stage]] = {}
        self.results: list[ModuleResult] = []
        self.lean = Lean(walk, [] if notes is None else notes)
        self.twin: nn.Module | None = None
        self.warming = warming
        self.aside = False  # whether what does not change from block to block was set aside

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        alone = self.ranks.count == 1  # several would wait for each other
        if kind is not None and alone and LATER[self.walk.device.type]:
            with suppress(StageError):
                self.hand_over()

    def block(self, index: int, items: list[BlockInput]) -> None:
        """Quantize one block; `items` come out as its output. It is handed over by `hand_over`, or by the next block.

        Out of memory, it is begun again from its inputs in ways that take less; once all of it is solved, only the
        batches that have not come through it are.
        """
        while not self._solved(index, items):
            self.hand_over()  # taking less may be more than can be had
            self.held_from = self.lean.less(index, items, self.held_from)
        block = self.walk.blocks[index]
        self.hand_over()  # the one before, if no stage has
        self.walk.read_soon(index + 1)  # likewise
        while not follow(self.walk, block, self.twin, index, items):
            self.held_from = self.lean.less(index, items, self.held_from)
        self.twin = None
        self.costs.send(self.walk.shelf.total())
        self.output.end(index)
        self.owed, self.costs = (index, self.costs), Costs()
        self.walk.release(block)

    def _solved(self, index: int, items: Sequence[BlockInput]) -> bool:
        """Solve a block and take all batches through it; False when memory ran out before the end of its last stage."""
        reached: list[Stage] = []
        stages: list[Stage] | None = None
        try:
            stages = self._stages(index, items[0])
            self._step(index, items, stages, reached)
        except torch.OutOfMemoryError:
            if self.ranks.count > 1:
                raise  # the others wait elsewhere
        except NotFiniteError:  # on all ranks
            self.hand_over()  # the block before may have put it out
            raise
        if stages is not None and len(reached) == len(stages):
            return True
        self.costs = Costs()
        self.walk.release(self.walk.blocks[index])
        return False

    def _stages(self, index: int, item: BlockInput) -> list[Stage]:
        block, prefix = self.walk.load(index, ahead=False), f"{self.walk.prefix}.{index}."
        linears = tuple(n for n in block_linears(block) if prefix + n in self.plan.grids)
        if linears and linears not in self.stages:
            self.stages[linears] = find_stages(self.walk, index, item, linears)
        return self.stages.get(linears, [])

    def _step(self, index: int, items: Sequence[BlockInput], stages: Sequence[Stage], reached: list[Stage]) -> None:
        """All batches through the block, stage by stage; `reached` are those that are solved."""
        block, prefix = self.walk.blocks[index], f"{self.walk.prefix}.{index}."
        shared = {id(p): p for p in block.parameters()}  # replaced, never changed in place: the twin keeps them
        self.twin = copy.deepcopy(block, shared) if self.settings.correct else None
        calibrate_experts(block, self.twin)

        def reach(stage: Stage, inputs: Inputs) -> None:
            self._stage(block, prefix, stage, self._then_read(inputs, index + 1) if stage is stages[-1] else inputs)
            reached.append(stage)

        step(self.walk, index, items, stages, reach, twin=self.twin, hold=self.lean.hold)

    def _then_read(self, inputs: Inputs, index: int) -> Inputs:
        """The inputs of a block's last stage. Once a GPU has all of them to work on the host only waits: time for other things."""
        yield from inputs
        self.hand_over()
        self.walk.read_soon(index)
        if not self.aside:
            set_aside(self.walk.device)
            self.aside = True

    def replay(self, index: int, items: Sequence[BlockInput]) -> None:
        """Run a block that was finished before an interruption, from its own files."""
        block = self.walk.load(index)
        prefix = f"{self.walk.prefix}.{index}."
        others = [item.arguments[index] for item in items]
        pass_on(self.walk, block, items, others, exact=True)
        for name, linear in block_linears(block).items():
            grid = self.plan.grids.get(prefix + name)
            if grid is not None:
                if self.ranks.first:
                    linear.weight.copy_(self.output.read(self._stored(prefix + name), grid.bits).to(self.walk.dtype))
                self.ranks.spread(linear.weight)
        pass_on(self.walk, block, items, others)
        self.output.resume(index)
        self.walk.release(block)

    def _stored(self, module: str) -> str:
        return self.walk.names[f"{module}.weight"].removesuffix(".weight")

    def _stage(self, block: nn.Module, prefix: str, stage: Stage, inputs: Inputs) -> None:
        """Accumulate the stage's Hessian over all batches, solve its linears, put the quantized weights in place."""
        linears: dict[str, Any] = {prefix + name: block.get_submodule(name) for name in stage.linears}
        moments = gather(
            inputs, next(iter(linears.values())).in_features, self.walk.device,
            drifting=bool(self.settings.correct), held_from=self.held_from, pool=self.ranks.pool,
        )  # fmt: skip
        if self.warming:
            self.warming.wait()
        solving = solve_stage(linears, self.plan.grids, moments, self.settings, self.ranks, wanted=self.judging)
        del moments  # as large as anything here; used up as it is solved
        for solved in solving:
            quantized = solved.solution.weight()
            self._keep(solved, quantized)
            linears[solved.name].weight = nn.Parameter(quantized.to(self.walk.dtype), requires_grad=False)

    def _keep(self, solved: Solved, quantized: Tensor) -> None:
        """Have one linear's tensors written, and what it cost counted."""
        self.costs.add(solved.name, solved.solution, self._survival(solved, quantized))
        self.output.put(self._stored(solved.name), solved.solution)

    def _survival(self, solved: Solved, quantized: Tensor) -> Tensor | None:
        """What is left of the adapter's delta in one module, None where it has none."""
        delta = None if solved.wanted is None else self.deltas(f"{self._stored(solved.name)}.weight")
        if delta is None or solved.wanted is None:
            return None
        return measure(delta.to(quantized.device), quantized - solved.wanted, solved.hessian)

    def hand_over(self) -> None:
        """Hand over the last block with what it cost, if that has not been done."""
        if self.owed is None:
            return
        (index, costs), self.owed = self.owed, None
        block, prefix = self.walk.blocks[index], f"{self.walk.prefix}.{index}."
        if not self.ranks.every(costs.finite()):
            raise StageError(
                f"{prefix.rstrip('.')}: its output holds NaN or infinity on the calibration text ({self.walk.dtype})"
            )
        pool_experts(block, self.ranks.total)
        results = costs.results(lambda name: share_added(block, name.removeprefix(prefix)))
        self.results += results
        self.output.commit(index, [asdict(r) for r in results])


@torch.no_grad()
def quantize(
    source: Path, out: Path, windows: Tensor, settings: Settings, *, dtype: torch.dtype, device: torch.device,
    batch: int | None = None, trust_remote_code: bool = False, max_shard: int = 5 * 10**9, meta: Mapping[str, Any] | None = None,
    deltas: Deltas | None = None, progress: Progress | None = None, ranks: Ranks = ALONE,
    notes: list[str] | None = None,
) -> tuple[Plan, list[ModuleResult]]:  # fmt: skip
    """Quantize the model in `source` into the existing directory `out`, going on from what `out` already holds.

    windows: calibration token ids, int64 [n, length]. dtype: of the tensors left unquantized (what servers run in).
    batch: windows at a time, by default about 2048 tokens on the CPU and 8192 on a GPU.
    Blocks compute in fp32 on the CPU and in `dtype` on a GPU. deltas: what an adapter added to the weights of `source`,
    to measure what comes through. `out` must belong to the same source, windows and settings: the caller names it after
    their digest. With several ranks each makes this call (`Ranks.call`); only the first needs deltas, writes and tells.
    notes: gets what goes otherwise than begun, such as smaller batches when memory runs out.
    """
    device = check_ranks(len(windows), device, ranks)
    checkpoint = Checkpoint(source)
    model = skeleton.build(
        skeleton.load_config(source, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
    )
    layout = plan(checkpoint, model, settings, dtype, where=source)
    ranks.meet(device)
    walk = Walk(checkpoint, model, device=device, dtype=torch.float32 if device.type == "cpu" else dtype)
    own, apart = ranks.share(len(windows)), stages.exact_apart(walk, windows) if settings.correct else 0
    room = stages.ROOM if ranks.count == 1 else stages.ROOM_SHARED
    walk.shelf = stages.shelf_for(walk, windows[own].numel(), 1 / apart if apart else 0, ranks.every, room)
    with (
        quick_switches(device),
        OnePass(walk.blocks, device, walk.dtype) as passes,
        Warming(device, narrowest(model, layout), settings, dtype, later=passes.try_out) as warming,
        Written(out, layout, checkpoint, max_bytes=max_shard) if ranks.first else Output() as output,
    ):
        size = batch or max(1, TOKENS[device.type] // windows.shape[1])
        items = walk.embed(windows[own], size)
        numbers = [first // size for first in range(own.start, own.stop, size)]  # among those of a rank alone
        if apart:
            stages.compared(walk, [i for i, n in zip(items, numbers, strict=True) if n % apart == 0])
        deciding = settings.order == "auto" and not settings.sweeps  # after sweeps there is nothing left to decide
        held_from = _held_from(-(-len(windows) // size), numbers) if deciding else None
        with Quantizer(
            walk, layout, settings, output, ranks, held_from=held_from, deltas=deltas, notes=notes, warming=warming
        ) as quantizer:
            _walk(quantizer, items, progress, passes)
        output.close()
    if ranks.first:
        damp = min((m.damp for m in quantizer.results), default=0.01)
        write_small_files(source, out, layout, settings, dtype=dtype, damp=damp, meta=meta or {})
        (out / JOURNAL).unlink(missing_ok=True)
    return layout, quantizer.results


def check_ranks(windows: int, device: torch.device, ranks: Ranks) -> torch.device:
    """This rank's own device; raises InputError for one GPU by its number, and for fewer calibration windows than ranks."""
    if windows < ranks.count:
        raise InputError(
            f"{windows} calibration windows cannot be split over {ranks.count} ranks: start fewer, or raise calibration.samples"
        )
    return ranks.place(device)


def _held_from(batches: int, numbers: Sequence[int]) -> int | None:
    """Which of this rank's batches, `numbers` among all `batches`, is the first that is held out; None with one batch in all."""
    first = batches - max(1, batches // HELD_SHARE)
    return sum(n < first for n in numbers) if batches > 1 else None


def _walk(quantizer: Quantizer, items: list[BlockInput], progress: Progress | None, passes: OnePass) -> None:
    """Quantize every block, or replay it where an earlier run left it whole; a block is written while the next is solved.

    Progress counts blocks on disk. `passes` are used from the second block on, whatever is compiled sooner: a run that
    goes on from here must compute the same numbers.
    """
    output, count = quantizer.output, len(quantizer.walk)
    finished = quantizer.ranks.tell(output.finished())
    started, told = time.monotonic(), 0

    def seen(done: int) -> None:
        nonlocal told
        if progress and done > told:
            told, since = done, (time.monotonic() - started) / max(done - len(finished), 1)
            progress(done, count, f"{since:.1f} s a block")

    for index in range(count):
        if index == 1:
            if quantizer.warming:
                quantizer.warming.wait_longer()
            passes.use()
        if index < len(finished):
            quantizer.replay(index, items)
            quantizer.results += [ModuleResult(**m) for m in finished[index]]
            seen(index + 1)
        else:
            quantizer.block(index, items)
            output.settle(BEHIND)
            seen(max(index - BEHIND, len(output.finished())))
            if not LATER[quantizer.walk.device.type]:
                quantizer.hand_over()
    quantizer.hand_over()
    output.settle()
    seen(count)

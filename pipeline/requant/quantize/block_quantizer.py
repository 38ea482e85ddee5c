"""Quantizer: calibrates, solves and commits one block after another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from requant.errors import NotFiniteError, StageError
from requant.modeling.block_walk import BlockInput, Walk
from requant.modeling.blocks import block_linears
from requant.modeling.linear_groups import Inputs, LinearGroup, find_linear_groups
from requant.modeling.moe import calibrate_experts, pool_experts, share_added
from requant.modeling.sequential import pass_on, run_block
from requant.numerics.delta_retention import Deltas, measure
from requant.numerics.hessian import gather
from requant.quantize.background_writer import BlockWriter
from requant.quantize.calibration_plan import CalibrationPlan
from requant.quantize.module_results import BlockResults, ModuleResult
from requant.quantize.out_of_memory import OutOfMemoryRecovery, follow
from requant.quantize.plan import Plan, Settings
from requant.quantize.solve import Solved, solve_group
from requant.quantize.warmup import WarmUp
from requant.runtime.device import profile_of
from requant.runtime.interpreter import freeze_garbage_collector
from requant.runtime.ranks import Ranks


class Quantizer:
    """Quantizes the blocks of one model; on an error, commits the block that is solved."""

    def __init__(
        self,
        walk: Walk,
        plan: Plan,
        settings: Settings,
        output: BlockWriter,
        ranks: Ranks,
        *,
        calibration: CalibrationPlan,
        deltas: Deltas | None,
        notes: list[str] | None = None,
        warming: WarmUp | None = None,
    ) -> None:
        """Prepare to quantize the blocks of `walk`.

        calibration: the plan of the batches given to `block`. deltas: the adapter's, by stored name.
        notes: gets a line for each change of plan. warming: waited for before the first group is solved.
        """
        self.walk, self.plan, self.settings, self.output, self.ranks = walk, plan, settings, output, ranks
        self.calibration = calibration
        self.deltas = deltas or (lambda _: None)
        self.measures_deltas = ranks.broadcast(deltas is not None)  # only the first rank has deltas
        self.block_results = BlockResults()
        self.uncommitted: tuple[int, BlockResults] | None = None  # the last block, until its results are on the host
        self.groups: dict[tuple[str, ...], list[LinearGroup]] = {}
        self.results: list[ModuleResult] = []
        self.recovery = OutOfMemoryRecovery(walk, [] if notes is None else notes)
        self.reference_block: nn.Module | None = None
        self.warming = warming
        self.gc_frozen = False  # whether objects that live through all blocks were excluded from garbage collection

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        alone = self.ranks.count == 1  # several would wait for each other
        if kind is not None and alone and profile_of(self.walk.device).commits_later:
            with suppress(StageError):
                self.commit_block()

    def block(self, index: int, items: list[BlockInput]) -> None:
        """Quantize one block; `items` become its output.

        `commit_block` or the next call commits the block.
        Out of memory, the block restarts from its inputs with a plan that takes less memory. Once all of its linears
        are solved, only the batches that have not passed the block run again.
        """
        while not self._solved(index, items):
            self.commit_block()  # no plan may take less: then leaner() raises
            self._take_less(index, items)
        block = self.walk.blocks[index]
        self.commit_block()  # the block before, if no group has committed it
        self.walk.read_soon(index + 1)  # likewise
        while not follow(self.walk, block, self.reference_block, index, items):
            self._take_less(index, items)
        self.reference_block = None
        self.block_results.send(self.walk.states.total())
        self.output.end(index)
        self.uncommitted, self.block_results = (index, self.block_results), BlockResults()
        self.walk.release(block)

    def _solved(self, index: int, items: Sequence[BlockInput]) -> bool:
        """Solve a block and run all batches through it; False: out of memory before the end."""
        solved: list[LinearGroup] = []
        groups: list[LinearGroup] | None = None
        try:
            groups = self._groups(index, items[0])
            self._step(index, items, groups, solved)
        except torch.OutOfMemoryError:
            if self.ranks.count > 1:
                raise  # the others wait elsewhere
        except NotFiniteError:  # on all ranks
            self.commit_block()  # the block before may have produced the NaN: its error is raised first
            raise
        if groups is not None and len(solved) == len(groups):
            return True
        self.block_results = BlockResults()
        self.walk.release(self.walk.blocks[index])
        return False

    def _take_less(self, index: int, items: list[BlockInput]) -> None:
        """Continue with a plan that takes less memory, after a collection of all garbage."""
        self.calibration = self.recovery.leaner(self.calibration, index, items)
        self.gc_frozen = False  # the recovery unfroze all objects: the next solved block freezes them again

    def _groups(self, index: int, item: BlockInput) -> list[LinearGroup]:
        block, prefix = self.walk.load(index, read_next=False), f"{self.walk.prefix}.{index}."
        linears = tuple(n for n in block_linears(block) if prefix + n in self.plan.grids)
        if linears and linears not in self.groups:
            self.groups[linears] = find_linear_groups(self.walk, index, item, linears)
        return self.groups.get(linears, [])

    def _step(
        self, index: int, items: Sequence[BlockInput], groups: Sequence[LinearGroup], solved: list[LinearGroup]
    ) -> None:
        """Run all batches through the block, group by group; `solved` gets each solved group."""
        block, prefix = self.walk.blocks[index], f"{self.walk.prefix}.{index}."
        shared = {
            id(p): p for p in block.parameters()
        }  # replaced, never changed in place: the reference block keeps them
        self.reference_block = copy.deepcopy(block, shared) if self.settings.correct else None
        calibrate_experts(block, self.reference_block)

        def on_group(group: LinearGroup, inputs: Inputs) -> None:
            self._solve_group(
                block, prefix, group, self._then_read(inputs, index + 1) if group is groups[-1] else inputs
            )
            solved.append(group)

        run_block(
            self.walk,
            index,
            items,
            groups,
            on_group,
            reference_block=self.reference_block,
            paused=self.calibration.inside_block,
        )

    def _then_read(self, inputs: Inputs, index: int) -> Inputs:
        """The inputs of a block's last group, then host work that overlaps with the GPU's."""
        yield from inputs
        self.commit_block()
        self.walk.read_soon(index)
        if not self.gc_frozen:
            freeze_garbage_collector(self.walk.device)
            self.gc_frozen = True

    def replay(self, index: int, items: Sequence[BlockInput]) -> None:
        """Run a block that was finished before an interruption, from its own files."""
        block = self.walk.load(index)
        prefix = f"{self.walk.prefix}.{index}."
        others = [item.arguments[index] for item in items]
        pass_on(self.walk, block, items, others, unquantized=True)
        for name, linear in block_linears(block).items():
            grid = self.plan.grids.get(prefix + name)
            if grid is not None:
                if self.ranks.first:
                    linear.weight.copy_(self.output.read(self._stored(prefix + name), grid.bits).to(self.walk.dtype))
                self.ranks.broadcast_tensor(linear.weight)
        pass_on(self.walk, block, items, others)
        self.output.resume(index)
        self.walk.release(block)

    def _stored(self, module: str) -> str:
        return self.walk.names[f"{module}.weight"].removesuffix(".weight")

    def _solve_group(self, block: nn.Module, prefix: str, group: LinearGroup, inputs: Inputs) -> None:
        """Accumulate the group's Hessian over all batches, solve its linears, replace their weights."""
        linears: dict[str, Any] = {prefix + name: block.get_submodule(name) for name in group.linears}
        moments = gather(
            inputs,
            next(iter(linears.values())).in_features,
            self.walk.device,
            drifting=bool(self.settings.correct),
            first_held_out=self.calibration.first_held_out,
            pool=self.ranks.all_reduce,
        )
        if self.warming:
            self.warming.wait()
        solving = solve_group(
            linears, self.plan.grids, moments, self.settings, self.ranks, keep_weights=self.measures_deltas
        )
        del moments  # the largest tensors here: the solver releases them as it proceeds
        for solved in solving:
            quantized = solved.solution.weight()
            self._keep(solved, quantized, linears[solved.name].weight)
            linears[solved.name].weight = nn.Parameter(quantized.to(self.walk.dtype), requires_grad=False)

    def _keep(self, solved: Solved, quantized: Tensor, source: Tensor) -> None:
        """Start to write one linear's tensors, and add its numbers to the block's results."""
        distance = (quantized - source).norm() / source.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
        self.block_results.add(solved.name, solved.solution, distance, self._retention(solved, quantized))
        self.output.put(self._stored(solved.name), solved.solution)

    def _retention(self, solved: Solved, quantized: Tensor) -> Tensor | None:
        """The adapter's delta against the error of one linear; None where there is no delta."""
        delta = None if solved.weight is None else self.deltas(f"{self._stored(solved.name)}.weight")
        if delta is None or solved.weight is None:
            return None
        return measure(delta.to(quantized.device), quantized - solved.weight, solved.hessian)

    def commit_block(self) -> None:
        """Commit the last block with its results, if it has not been committed.

        Raises StageError when the block's output is not finite.
        """
        if self.uncommitted is None:
            return
        (index, block_results), self.uncommitted = self.uncommitted, None
        block, prefix = self.walk.blocks[index], f"{self.walk.prefix}.{index}."
        if not self.ranks.all(block_results.finite()):
            raise StageError(
                f"{prefix.rstrip('.')}: its output holds NaN or infinity on the calibration text ({self.walk.dtype})"
            )
        pool_experts(block, self.ranks.sum)
        results = block_results.results(lambda name: share_added(block, name.removeprefix(prefix)))
        self.results += results
        self.output.commit(index, [r.row() for r in results])

"""Rehearsal: time and memory to run, quantize and score random blocks, one of each kind.

The cost does not depend on the values of weights, so only shapes are read (and, for the merge, one tensor of each
kind). `forecast` adds the pieces up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from requant.evaluate.streamed import StreamedModel
from requant.modeling import skeleton
from requant.modeling.block_walk import BlockInput, Walk
from requant.modeling.blocks import block_linears, block_list, samples
from requant.modeling.fused_ops import FusedOps
from requant.modeling.hidden_state_store import HiddenStateStore
from requant.modeling.sequential import start_unquantized
from requant.numerics.delta_retention import Deltas
from requant.quantize.background_writer import BlockWriter
from requant.quantize.block_quantizer import Quantizer
from requant.quantize.calibration_plan import CalibrationPlan, plan_calibration
from requant.quantize.plan import Plan, Settings
from requant.runtime import measurements
from requant.runtime.device import compute_dtype
from requant.runtime.ranks import SINGLE_PROCESS

MORE = 2  # batches by which the second rehearsal is longer than the first
TILE = 2**20


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds, and peak bytes beyond those in use before."""

    seconds: float = 0.0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.bytes + other.bytes)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(max(0.0, self.seconds - other.seconds), max(0, self.bytes - other.bytes))

    def __mul__(self, times: float) -> Cost:
        return Cost(self.seconds * times, int(self.bytes * times))


def cost_of(device: torch.device, work: Callable[[], object]) -> Cost:
    """Time and peak memory of one call of `work`."""
    before = _held(device, reset=True)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Cost(time.perf_counter() - started, max(0, _held(device, reset=False) - before))


def _held(device: torch.device, *, reset: bool) -> int:
    if device.type != "cuda":
        return measurements.reset_peak() if reset else measurements.peak()
    if reset:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return torch.cuda.max_memory_allocated(device)


class RandomWeights:
    """Random weights by parameter name, shaped as stored: one tile of normal numbers, repeated."""

    path = Path("rehearsal")

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        transposed = {f"{module}.weight" for module in skeleton.conv1d_modules(model)}
        self.shapes = {
            n: tuple(p.shape)[::-1] if n in transposed else tuple(p.shape)
            for n, p in model.named_parameters(remove_duplicate=False)
        }
        self.tile = torch.randn(TILE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def read(self, name: str) -> Tensor:
        shape = self.shapes[name]
        count = torch.Size(shape).numel()
        if len(shape) < 2:
            return torch.ones(shape, device=self.tile.device)
        return self.tile.repeat(-(-count // TILE))[:count].view(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """Cost of quantizing all blocks, one by one.

    one: with one batch. more: each further batch. unquantized: each further batch that also runs unquantized.
    calibration: the plan of the real run on one rank.
    """

    one: Cost
    more: Cost
    unquantized: Cost
    calibration: CalibrationPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Cost of scoring: all blocks, one by one, on a batch of `tokens` tokens and on one token; the LM head.

    head: of each batch after a set's first. first: of the first. Both alone, and against a reference.
    """

    tokens: int
    forward: Cost
    token: Cost
    head: tuple[Cost, Cost]
    first: tuple[Cost, Cost]


class Rehearsal:
    """One block of each frequent kind of a model, on a device.

    samples: (index of a block, how many it stands for).
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device, self.weights = model, device, RandomWeights(model, device)
        self.samples = samples(block_list(model)[1])
        self.names = {n: n for n in self.weights}

    def walk(self, dtype: torch.dtype) -> Walk:
        walk = Walk(self.weights, self.model, device=self.device, dtype=dtype, names=self.names)
        walk.no_reading_ahead()
        return walk

    @property
    def effort(self) -> float:
        """Flops to solve the blocks that are rehearsed, roughly."""
        blocks = block_list(self.model)[1]
        shapes = [m.weight.shape for index, _ in self.samples for m in block_linears(blocks[index]).values()]
        return float(sum(n * n * (2 * n + 4 * rows) for rows, n in shapes))

    def _of_all(self, costs: Iterable[Cost]) -> Cost:
        """The cost of all blocks, one by one. costs: of the samples."""
        every = list(costs)
        seconds = sum(cost.seconds * count for cost, (_, count) in zip(every, self.samples, strict=True))
        return Cost(seconds, max(cost.bytes for cost in every))

    @torch.no_grad()
    def quantizing(self, plan: Plan, settings: Settings, windows: Tensor, batch: int, deltas: Deltas) -> Quantized:
        """What `quantize` would do. deltas: what the adapter adds, by parameter."""
        walk = self.walk(compute_dtype(self.device, torch.bfloat16))
        calibration = plan_calibration(walk, windows, settings, SINGLE_PROCESS, batch=batch)
        whole = len(calibration.unquantized) == len(calibration.batches)  # every batch also runs unquantized
        walk.states = HiddenStateStore(self.device, on_host=calibration.on_host)

        def once(index: int, count: int) -> Cost:
            items = walk.embed(windows[:batch].repeat(count, 1), batch)
            sample = replace(
                calibration,
                batches=tuple(len(item.hidden) for item in items),
                unquantized=tuple(range(len(items))) if whole else calibration.unquantized[:1],
                first_held_out=None,
            )
            start_unquantized(walk, [items[i] for i in sample.unquantized])
            walk.forget(0)
            walk.load(index)
            quantizer = Quantizer(
                walk, plan, settings, BlockWriter(), SINGLE_PROCESS, calibration=sample, deltas=deltas
            )
            quantizer.gc_frozen = True  # nothing is set aside for one block
            return cost_of(self.device, lambda: quantizer.block(index, items))

        with FusedOps(walk.blocks, self.device, walk.dtype) as passes:
            passes.use()
            firsts, mores = list[Cost](), list[Cost]()
            for index, _ in self.samples:
                if self.device.type == "cuda":
                    once(index, 1)  # kernels are compiled
                firsts.append(once(index, 1))
                mores.append((once(index, 1 + MORE) - firsts[-1]) * (1 / MORE))
        walk.release(self.model)
        one, more = self._of_all(firsts), self._of_all(mores)
        return Quantized(
            one=one,
            more=more * 0.5 if whole else more,
            unquantized=more if whole else more * 2.0,
            calibration=calibration,
        )

    @torch.no_grad()
    def scoring(self, eval_set: Any, batch: int, dtype: torch.dtype, scratch: Path) -> Scored:
        """What scoring the windows of `eval_set` (all of one length) in batches costs.

        scratch: a folder.
        """
        walk = self.walk(dtype)
        model = StreamedModel(walk)
        ids = torch.stack([w.ids for w in eval_set.windows])
        short, items = walk.embed(ids[:1, :1], 1)[0], walk.embed(ids, batch)
        walk.forget(0)
        runs = [self._runs(walk, index, items[0], short) for index, _ in self.samples]
        forward, token = (self._of_all(costs) for costs in zip(*runs, strict=True))
        for rows, item in zip(torch.split(ids, batch), items, strict=True):
            model.set_hidden_states(rows, item)
        first = replace(eval_set, windows=eval_set.windows[:batch])
        self._heads(model, first, batch, scratch)  # the first call of all is slower
        one, all_ = (self._heads(model, s, batch, scratch) for s in (first, eval_set))
        more = max(1, len(items) - 1)
        heads = [(b - a) * (1 / more) if len(items) > 1 else b for a, b in zip(one, all_, strict=True)]
        walk.release(self.model)
        return Scored(tokens=ids[:batch].numel(), forward=forward, token=token, head=(heads[0], heads[1]), first=one)

    def _runs(self, walk: Walk, index: int, item: BlockInput, short: BlockInput) -> tuple[Cost, Cost]:
        """One block on a batch and on a token."""
        walk.load(index)
        walk.run(index, item)
        found = [cost_of(self.device, partial(walk.run, index, one)) for one in (item, short)]
        walk.release(walk.blocks[index])
        return found[0], found[1]

    def _heads(self, model: StreamedModel, eval_set: Any, batch: int, scratch: Path) -> tuple[Cost, Cost]:
        """Scoring a set whose blocks are done: alone, writing hidden states, and against these."""
        from requant_eval.scoring.score_loop import score

        file = scratch / "reference.safetensors"
        options: Any = {"batch": batch, "device": self.device}
        alone = cost_of(self.device, lambda: score(model, eval_set, write_reference=file, **options))
        return alone, cost_of(self.device, lambda: score(model, eval_set, reference=file, **options))

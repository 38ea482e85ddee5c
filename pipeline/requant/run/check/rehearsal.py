"""What a stage's pieces cost on this machine: one block of random weights is run, quantized and scored, and timed.

The work does not depend on the values of weights, so nothing of a model is read but its shapes (and, for the merge, one
tensor of each kind). `forecast` adds the pieces up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from requant.evaluate.streamed import Streamed
from requant.modeling.block_walk import Walk, block_linears, block_list
from requant.modeling.fused_ops import OnePass
from requant.modeling.hidden_state_store import Shelf
from requant.modeling.sequential import compared
from requant.numerics.delta_retention import Deltas
from requant.quantize.background_writer import Output
from requant.quantize.block_quantizer import Quantizer
from requant.quantize.memory import exact_apart, may_wait
from requant.quantize.plan import Plan, Settings
from requant.runtime import measurements
from requant.runtime.ranks import SINGLE_PROCESS

MORE = 2  # batches by which the second rehearsal is longer than the first
TILE = 2**20


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds, and bytes at the worst moment beyond what was there before."""

    seconds: float = 0.0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.bytes + other.bytes)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(max(0.0, self.seconds - other.seconds), max(0, self.bytes - other.bytes))

    def __mul__(self, times: float) -> Cost:
        return Cost(self.seconds * times, int(self.bytes * times))


def cost_of(device: torch.device, work: Callable[[], object]) -> Cost:
    """Do it once and see."""
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


class Drawn:
    """Random weights in the shapes of a skeleton, by parameter name: a tile of normal numbers, again and again."""

    path = Path("rehearsal")

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
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


@dataclass(frozen=True, slots=True)
class Quantized:
    """A block with one batch; what each plain one beyond costs, and each that also runs unquantized, one in `apart` (0: none).

    waits: whether batches wait inside a block.
    """

    one: Cost
    more: Cost
    exact: Cost
    apart: int
    waits: bool


@dataclass(frozen=True, slots=True)
class Scored:
    """A block on a batch of windows of so many tokens; a block on one token; scoring those after a set's first, and the first.

    head and first: alone, and against a reference.
    """

    tokens: int
    forward: Cost
    token: Cost
    head: tuple[Cost, Cost]
    first: tuple[Cost, Cost]


class Rehearsal:
    """One block of a model, the middle one, on a device."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device, self.weights = model, device, Drawn(model, device)
        self.names = {n: n for n in self.weights}

    def walk(self, dtype: torch.dtype) -> Walk:
        walk = Walk(self.weights, self.model, device=self.device, dtype=dtype, names=self.names)
        walk.no_reading_ahead()
        return walk

    @property
    def parameters(self) -> int:
        """Of the block that is rehearsed."""
        blocks = block_list(self.model)[1]
        return sum(p.numel() for p in blocks[len(blocks) // 2].parameters())

    @property
    def effort(self) -> float:
        """Flops to solve the block that is rehearsed, roughly."""
        blocks = block_list(self.model)[1]
        shapes = [m.weight.shape for m in block_linears(blocks[len(blocks) // 2]).values()]
        return float(sum(n * n * (2 * n + 4 * rows) for rows, n in shapes))

    @torch.no_grad()
    def quantizing(self, plan: Plan, settings: Settings, windows: Tensor, batch: int, deltas: Deltas) -> Quantized:
        """What `quantize` would do. deltas: what the adapter adds, by parameter."""
        walk = self.walk(torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        apart = exact_apart(walk, windows) if settings.correct else 0
        waits = may_wait(walk, windows.numel(), 1 / apart if apart else 0)
        walk.shelf = Shelf(self.device, on_host=not waits)
        index = len(walk) // 2

        def once(count: int) -> Cost:
            items = walk.embed(windows[:batch].repeat(count, 1), batch)
            compared(walk, items[: {0: 0, 1: count}.get(apart, 1)])
            walk.forget(0)
            walk.load(index)
            quantizer = Quantizer(walk, plan, settings, Output(), SINGLE_PROCESS, held_from=None, deltas=deltas)
            quantizer.aside = True  # nothing is set aside for one block
            return cost_of(self.device, lambda: quantizer.block(index, items))

        with OnePass(walk.blocks, self.device, walk.dtype) as passes:
            passes.use()
            if self.device.type == "cuda":
                once(1)  # kernels are compiled
            one = once(1)
            more = (once(1 + MORE) - one) * (1 / MORE)
        walk.release(self.model)
        return Quantized(one, more * 0.5 if apart == 1 else more, more if apart == 1 else more * 2.0, apart, waits)

    @torch.no_grad()
    def scoring(self, eval_set: Any, batch: int, dtype: torch.dtype, scratch: Path) -> Scored:
        """What scoring the windows of `eval_set` (all of one length) in batches costs. scratch: a folder."""
        walk = self.walk(dtype)
        model = Streamed(walk)
        ids = torch.stack([w.ids for w in eval_set.windows])
        index, short, items = len(walk) // 2, walk.embed(ids[:1, :1], 1)[0], walk.embed(ids, batch)
        walk.forget(0)
        walk.load(index)
        walk.run(index, items[0])
        forward = cost_of(self.device, lambda: walk.run(index, items[0]))
        token = cost_of(self.device, lambda: walk.run(index, short))
        walk.release(walk.blocks[index])
        for rows, item in zip(torch.split(ids, batch), items, strict=True):
            model.assume(rows, item)
        first = replace(eval_set, windows=eval_set.windows[:batch])
        one, all_ = (self._heads(model, s, batch, scratch) for s in (first, eval_set))
        more = max(1, len(items) - 1)
        heads = [(b - a) * (1 / more) if len(items) > 1 else b for a, b in zip(one, all_, strict=True)]
        walk.release(self.model)
        return Scored(ids[:batch].numel(), forward, token, (heads[0], heads[1]), one)

    def _heads(self, model: Streamed, eval_set: Any, batch: int, scratch: Path) -> tuple[Cost, Cost]:
        """Scoring a set whose blocks are done: alone, writing hidden states, and against these."""
        from requant_eval.scoring.score_loop import score

        file = scratch / "reference.safetensors"
        options: Any = {"batch": batch, "device": self.device}
        score(model, eval_set, write_reference=file, **options)
        alone = cost_of(self.device, lambda: score(model, eval_set, write_reference=file, **options))
        return alone, cost_of(self.device, lambda: score(model, eval_set, reference=file, **options))

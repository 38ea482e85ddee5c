"""Stage: block by block calibrate, solve, replace, carry on, write a GPTQ checkpoint.

One block is resident. Each finished block is on disk before the next begins, and is a resume point: a killed run
replays the finished blocks from their own files and goes on with the same numbers.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from requant import gptq, pack, skeleton
from requant.blocks import BlockInput, Stage, Walk, block_linears, find_stages, step
from requant.checkpoint import Checkpoint, write_text
from requant.errors import StageError
from requant.grid import Grid
from requant.layout import Plan, Settings, plan, write_small_files
from requant.survival import Deltas, survival
from requant.writer import CheckpointWriter

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
JOURNAL = "blocks.json"
EXACT_SHARE = 2  # one in so many batches also runs unquantized, to know what earlier layers lost
HELD_SHARE = 8  # one in so many batches judges the column order, the others make the candidates


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """What quantizing one linear cost on the calibration text, against the weight it was solved for.

    loss: tr(E H E'). relative_error: sqrt(tr(E H E') / tr(W H W')). With `correct`, W is the corrected weight: what it makes
    up for is not counted as an error. rtn_error: the same for rounding W to nearest on min-max scales.
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


class Quantizer:
    """The walk over one model; holds what every block needs. Use `quantize`."""

    def __init__(
        self, walk: Walk, plan: Plan, settings: Settings, writer: CheckpointWriter, size: tuple[int, int],
        deltas: Deltas,
    ) -> None:  # fmt: skip
        """size: calibration tokens, and the batches they come in. deltas: by the name of the tensor in the checkpoint."""
        self.walk, self.plan, self.settings, self.writer = walk, plan, settings, writer
        self.tokens, self.batches = size
        self.deltas = deltas
        self.stages: dict[tuple[str, ...], list[Stage]] = {}
        self.results: list[ModuleResult] = []

    def block(self, index: int, items: Sequence[BlockInput]) -> None:
        """Quantize one block and write it; `items` come out as the quantized block's output."""
        block = self.walk.load(index)
        prefix = f"{self.walk.prefix}.{index}."
        linears = tuple(n for n in block_linears(block) if prefix + n in self.plan.grids)
        if linears and linears not in self.stages:
            self.stages[linears] = find_stages(self.walk, index, items[0], linears)
        twin = copy.deepcopy(block) if self.settings.correct else None

        def reach(stage: Stage, inputs: Iterator[tuple[Tensor, Tensor | None]]) -> None:
            self._stage(block, prefix, stage, inputs)

        step(self.walk, index, items, self.stages.get(linears, []), reach, twin)
        self._check_finite(prefix, items)
        self._write_rest(index)
        self.walk.release(block)

    def replay(self, index: int, items: Sequence[BlockInput]) -> None:
        """Run a block that was finished before an interruption, from its own files."""
        block = self.walk.load(index)
        prefix = f"{self.walk.prefix}.{index}."
        if self.settings.correct:
            for item in items:
                if item.exact is not None:
                    item.exact = self.walk.forward(block, item.exact, item.arguments[index])
        for name, linear in block_linears(block).items():
            grid = self.plan.grids.get(prefix + name)
            if grid is not None:
                stored = self._stored(prefix + name)
                tensors = {s: self.writer.read(f"{stored}.{s}") for s in pack.SUFFIXES}
                linear.weight.copy_(pack.dequantize(tensors, grid.bits).to(self.walk.dtype))
        for item in items:
            item.hidden = self.walk.run(index, item)
        self.walk.release(block)

    def _stored(self, module: str) -> str:
        return self.walk.names[f"{module}.weight"].removesuffix(".weight")

    def _stage(
        self, block: nn.Module, prefix: str, stage: Stage, inputs: Iterator[tuple[Tensor, Tensor | None]]
    ) -> None:
        """Accumulate the stage's Hessian over all batches, solve its linears, put the quantized weights in place."""
        linears: dict[str, Any] = {prefix + name: block.get_submodule(name) for name in stage.linears}
        n = next(iter(linears.values())).in_features
        train, held = (torch.zeros(n, n, device=self.walk.device) for _ in range(2))
        last = self.batches - max(1, self.batches // HELD_SHARE)
        drift = torch.zeros(n, n, device=self.walk.device)
        drifting = 0
        for i, (x, exact) in enumerate(inputs):
            gptq.add_to_hessian(held if i >= last else train, x)
            if exact is not None:
                gptq.add_drift(drift, x, exact)
                drifting += x.shape[:-1].numel()
        hessian, drift = gptq.symmetrize(train + held).div_(self.tokens), drift.div_(max(drifting, 1))
        if not torch.isfinite(hessian.diagonal()).all():
            raise StageError(f"{prefix}{stage.linears[0]}: its calibration inputs hold NaN or infinity")
        damp = self._damp(n)
        weights = {name: linear.weight.float() for name, linear in linears.items()}
        grid = self.plan.grids[next(iter(linears))]
        order = self._order(list(weights.values()), (train, held), grid, damp)
        factors: dict[tuple[str, int], gptq.Factor] = {}
        for name, linear in linears.items():
            weight = gptq.correct(weights[name], hessian, drift, damp, self.settings.correct)
            solution = gptq.quantize_weight(
                weight,
                hessian,
                self.plan.grids[name],
                order=order,
                damp=damp,
                sweeps=self.settings.sweeps,
                factors=factors,
            )
            quantized = solution.weight()
            self._keep(name, solution, self._survival(name, quantized - weight, hessian, solution.loss))
            linear.weight.copy_(quantized.to(self.walk.dtype))

    def _survival(self, name: str, error: Tensor, hessian: Tensor, loss: float) -> dict[str, float | None]:
        """What is left of the adapter's delta in one module, {} where it has none."""
        delta = self.deltas(f"{self._stored(name)}.weight")
        return {} if delta is None else asdict(survival(delta.to(error.device), error, hessian, loss))

    def _damp(self, n: int) -> float:
        """The recipe's damping, or 0.02 with at least 16 tokens for each of `n` inputs, else 0.05."""
        if self.settings.damp is not None:
            return self.settings.damp
        return 0.02 if self.tokens >= 16 * n else 0.05

    def _order(self, weights: Sequence[Tensor], halves: tuple[Tensor, Tensor], grid: Grid, damp: float) -> gptq.Order:
        """The recipe's order; `auto` lets held-out batches decide, unless sweeps follow: they leave nothing to decide."""
        asked = self.settings.order
        if asked != "auto":
            return asked
        if self.settings.sweeps or self.batches == 1:
            return "activation"
        train, held = gptq.symmetrize(halves[0]), gptq.symmetrize(halves[1])
        return gptq.better_order(weights, train, held, grid, ("activation", "group"), damp)

    def _keep(self, name: str, solution: gptq.Solution, adapted: Mapping[str, float | None]) -> None:
        """Write one linear's tensors and remember what it cost."""
        grid = solution.grid
        if solution.fallback:
            log.warning("%s: rounded without error feedback (damp %.2f)", name, solution.damp)
        for suffix, tensor in pack.pack(solution.codes, solution.scales.scale, solution.scales.zero, grid.bits).items():
            self.writer.write(f"{self._stored(name)}.{suffix}", tensor)
        self.results.append(
            ModuleResult(
                name,
                grid.bits,
                grid.group_size,
                solution.loss,
                solution.relative,
                solution.rtn_relative,
                solution.damp,
                solution.order,
                solution.fallback,
                **adapted,
            )
        )

    def _check_finite(self, prefix: str, items: Sequence[BlockInput]) -> None:
        for item in items:
            if not torch.isfinite(item.hidden).all():
                raise StageError(
                    f"{prefix.rstrip('.')}: its output holds NaN or infinity on the calibration text ({self.walk.dtype})"
                )

    def _write_rest(self, index: int) -> None:
        """The block's tensors that are not quantized, in the serving dtype."""
        slots = {s.name: s for s in self.plan.slots}
        for name in self.plan.block_slots[index]:
            if name in self.walk.checkpoint:
                self.writer.write(name, convert(name, self.walk.checkpoint.read(name), slots[name].dtype))


def convert(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast an unquantized tensor to the serving dtype; raises StageError when it does not fit."""
    out = tensor.to(dtype)
    if dtype.is_floating_point and not torch.isfinite(out).all():
        raise StageError(f"{name} does not fit {str(dtype).removeprefix('torch.')}: set quantize.dtype to bfloat16")
    return out


@torch.no_grad()
def quantize(
    source: Path, out: Path, windows: Tensor, settings: Settings, *, dtype: torch.dtype, device: torch.device,
    batch: int = 1, trust_remote_code: bool = False, max_shard: int = 5 * 10**9, meta: Mapping[str, Any] | None = None,
    deltas: Deltas | None = None, progress: Progress | None = None,
) -> tuple[Plan, list[ModuleResult]]:  # fmt: skip
    """Quantize the model in `source` into the existing directory `out`, going on from what `out` already holds.

    windows: calibration token ids, int64 [n, length]. dtype: of the tensors left unquantized (what servers run in).
    Blocks compute in fp32 on the CPU and in `dtype` on a GPU. deltas: what an adapter added to the weights of `source`,
    to measure what comes through. `out` must belong to the same source, windows and
    settings: the caller names it after their digest.
    """
    checkpoint = Checkpoint(source)
    model = skeleton.build(
        skeleton.load_config(source, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
    )
    layout = plan(checkpoint, model, settings, dtype, where=source)
    walk = Walk(checkpoint, model, device=device, dtype=torch.float32 if device.type == "cpu" else dtype)
    journal = _read_journal(out)
    with CheckpointWriter(out, layout.slots, max_bytes=max_shard, resume=bool(journal)) as writer:
        items = walk.embed(windows, batch)
        if settings.correct:
            for item in items[::EXACT_SHARE]:
                item.exact = item.hidden
        size = (windows.numel(), len(items))
        quantizer = Quantizer(walk, layout, settings, writer, size, deltas or (lambda _: None))
        for index in range(len(walk)):
            started = time.monotonic()
            if index < len(journal):
                quantizer.replay(index, items)
                quantizer.results += [ModuleResult(**m) for m in journal[index]]
                writer.mark_written(layout.block_slots[index])
            else:
                before = len(quantizer.results)
                quantizer.block(index, items)
                writer.sync()
                journal.append([asdict(m) for m in quantizer.results[before:]])
                write_text(out / JOURNAL, json.dumps(journal))
            if progress:
                progress(index + 1, len(walk), f"{time.monotonic() - started:.1f} s a block")
        inside = {n for names in layout.block_slots for n in names}
        for slot in layout.slots:
            if slot.name not in inside:
                writer.write(slot.name, convert(slot.name, checkpoint.read(slot.name), slot.dtype))
        writer.close()
    damp = min((m.damp for m in quantizer.results), default=0.01)
    write_small_files(source, out, layout, settings, dtype=dtype, damp=damp, meta=meta or {})
    (out / JOURNAL).unlink()
    return layout, quantizer.results


def _read_journal(out: Path) -> list[list[dict[str, Any]]]:
    """Results of the blocks finished before an interruption."""
    file = out / JOURNAL
    if not file.exists():
        return []
    journal: list[list[dict[str, Any]]] = json.loads(file.read_text())
    return journal

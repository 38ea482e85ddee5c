"""Delta retention of a grid, predicted from a sample of weights in seconds, before GPTQ.

The weights of a dequantized NF4 base lie on a coarse grid. Where the new grid coincides with it, rounding D + dW gives
the same codes as rounding D, and a small dW is lost. Each sampled module is rounded to nearest on the recipe's grid,
with the recipe's scale search and equal weight for all inputs, since no Hessian exists yet. Then

    retention = <Q - D, dW> / <dW, dW>,     Q = round(D + dW)

pooled over the sample: 1 when the rounding errors are independent of the delta, 0 when they undo it. Rounding to
nearest is the worst case: GPTQ's error feedback works like a dither. On the demo, whose delta is 0.3 % of the weights,
rounding keeps 24 % and GPTQ 97 %. What GPTQ keeps is measured while it runs (`numerics/delta_retention.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from requant.checkpoint.run_directory import RunDirectory
from requant.errors import InputError
from requant.merge.deltas import delta_of
from requant.merge.plan import MergePlan, Op
from requant.merge.stage import compute
from requant.numerics.delta_retention import Delta
from requant.numerics.finite import all_finite
from requant.numerics.grid import Grid, find_scales, nearest
from requant.quantize.plan import Plan
from requant.run.stage_results import EstimateFacts, PredictionFacts, PredictionResult

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
BLOCKS, ROWS, FEWEST = 3, 192, 32
WEIGHTS = ROWS * 1536  # of a module at most, where these are more rows than the fewest
LIMIT = 0.95  # a grid that keeps less is worth a warning
GROUPS = (32, 64, 128)
USUALLY = "GPTQ usually keeps nearly all of it: 97% on the demo, where rounding keeps 24%"


@dataclass(frozen=True)
class Sample:
    """Some rows of one module: D + dW and dW, fp32 [rows, n], and the grid of its quantization."""

    module: str
    merged: Tensor
    delta: Tensor
    grid: Grid

    @cached_property
    def error(self) -> Tensor:
        """The error of rounding to nearest on the grid, fp32 [rows, n]."""
        return rounded(self.merged, self.grid) - self.merged


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How much of the adapter's delta rounding to nearest keeps, over a sample.

    grid: the recipe's, in words. retention: {"value", "se", "low", "high"}, clustered by row. relative_delta: |dW| /
    |D + dW|. relative_error: |Q - (D + dW)| / |D + dW|. others: retention of other grids on the same sample, by their
    names, where the recipe's keeps too little.
    """

    grid: str
    retention: EstimateFacts
    relative_delta: float
    relative_error: float
    modules: int
    blocks: tuple[str, ...]
    others: dict[str, EstimateFacts]
    seconds: float

    def sentence(self) -> str:
        """One line for `requant check`."""
        r = self.retention
        return (
            f"the adapter's delta is {self.relative_delta:.1%} of the weights; rounding to nearest keeps "
            f"{r['value']:.1%} of it ({r['low']:.1%} to {r['high']:.1%}), error {self.relative_error:.1%} "
            f"({self.modules} modules of layers {', '.join(self.blocks)})"
        )

    def warnings(self, *, four_bit: bool = True) -> list[str]:
        """A warning where another grid of the same bits surely keeps more of a delta that rounding loses.

        four_bit: whether the base's weights lie on a 4-bit grid of their own, with which the recipe's can resonate.
        """
        bits = {part for part in self.grid.split() if part.endswith("-bit")}
        better = {n: r for n, r in self.others.items() if r["low"] > self.retention["high"] and n.split()[0] in bits}
        if self.retention["high"] >= LIMIT or not better:
            return []
        shown = ", ".join(f"{n} {r['value']:.0%}" for n, r in better.items())
        title = "grid resonance" if four_bit else "delta retention"
        why = ", since that grid and the base's own 4-bit grid fall together" if four_bit else ""
        return [
            f"{title}: rounded to nearest on the {self.grid} grid only {self.retention['value']:.0%} of the "
            f"adapter's delta is left{why} (other quantize.group_size: {shown}). {USUALLY}; the report says how much. "
            "Never ship this grid without GPTQ"
        ]


def predict(plan: MergePlan, layout: Plan, device: torch.device = CPU) -> Prediction | None:
    """Sample the first, middle and last block that the adapter touches.

    None when no delta is quantized.
    """
    started = time.monotonic()
    samples = list(draw(plan, layout, device))
    if not any(bool(s.delta.any()) for s in samples):
        return None
    kept = retention(samples)
    size, delta, error = (_norm(part) for part in zip(*(_norms(s) for s in samples), strict=True))
    others = {}
    if kept["high"] < LIMIT:
        others = {_name(grid): retention(put) for grid, put in _alternatives(samples)}
    blocks = tuple(dict.fromkeys(_block(s.module, layout.prefix) for s in samples))
    grids = " and ".join(dict.fromkeys(_name(s.grid) for s in samples))
    seconds = time.monotonic() - started
    return Prediction(
        grid=grids,
        retention=kept,
        relative_delta=delta / size,
        relative_error=error / size,
        modules=len(samples),
        blocks=blocks,
        others=others,
        seconds=seconds,
    )


def stored_prediction(
    run: RunDirectory, key: str, plan: MergePlan, layout: Plan, device: torch.device
) -> PredictionResult:
    """{"prediction": facts or None}, made once for the `key` of a quantization.

    Warnings go to the log.
    """
    stored = cast("PredictionResult | None", run.result("resonance", key))
    if stored is None:
        predicted = predict(plan, layout, device)
        for warning in predicted.warnings(four_bit=plan.base.four_bit) if predicted else []:
            log.warning("%s", warning)
        stored = {"prediction": cast(PredictionFacts, asdict(predicted)) if predicted else None}
        run.remember("resonance", key, dict(stored))
    return stored


def draw(plan: MergePlan, layout: Plan, device: torch.device = CPU) -> Iterator[Sample]:
    """Some rows of every adapted module in BLOCKS evenly spaced blocks, on `device`."""
    touched = {op.name: op for op in plan.ops if op.folds or op.replacement is not None}
    adapted = {m: touched[t] for m, t in layout.weights.items() if t in touched}
    blocks = list(dict.fromkeys(_block(m, layout.prefix) for m in adapted))
    last = len(blocks) - 1
    chosen = {blocks[round(i * last / max(1, BLOCKS - 1))] for i in range(BLOCKS)} if blocks else set()
    for module, op in adapted.items():
        if _block(module, layout.prefix) in chosen and (delta := delta_of(plan, op)) is not None:
            yield _rows(plan, module, op, layout.grids[module], delta, device)


def _rows(plan: MergePlan, module: str, op: Op, grid: Grid, delta: Delta, device: torch.device) -> Sample:
    merged = compute(plan, op, device)[0].to(device).float()  # some kinds are folded on the CPU
    if not all_finite(merged):
        raise InputError(f"{op.name}: NaN or infinity in the adapter or base weights: train or download them again")
    merged = merged.T if op.conv1d else merged
    count = min(merged.shape[0], ROWS, max(FEWEST, WEIGHTS // merged.shape[1]))
    which = torch.arange(count) * merged.shape[0] // count
    return Sample(module, merged[which.to(device)].contiguous(), delta.rows(which).dense().to(device), grid)


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    """Round to nearest on the grid's own scales, every input alike: fp32 [rows, n]."""
    scales = find_scales(weight, torch.ones(weight.shape[1], device=weight.device), grid)
    return nearest(weight, scales, grid)


def retention(samples: Sequence[Sample]) -> EstimateFacts:
    """<Q - D, dW> / <dW, dW> over all samples, with a 95 % interval clustered by row."""
    from requant_eval.metrics import statistics as st

    kept, whole = [], []
    for s in samples:
        square = (s.delta * s.delta).sum(dim=1, dtype=torch.float64)
        kept.append(square + (s.error * s.delta).sum(dim=1, dtype=torch.float64))
        whole.append(square)
    return cast(EstimateFacts, asdict(st.ratio(torch.cat(kept).cpu().numpy(), torch.cat(whole).cpu().numpy())))


def _alternatives(samples: Sequence[Sample]) -> Iterator[tuple[Grid, list[Sample]]]:
    """The same samples with other groups and with 8 bits, where all of them can be cut that way."""
    own = samples[0].grid
    for size in GROUPS:
        if size != own.group_size and all(s.merged.shape[1] % size == 0 for s in samples):
            grid = replace(own, group_size=size)
            yield grid, [replace(s, grid=grid) for s in samples]
    if own.bits < 8:
        grid = replace(own, bits=8)
        yield grid, [replace(s, grid=grid) for s in samples]


def _name(grid: Grid) -> str:
    return f"{grid.bits}-bit {'per row' if grid.group_size == -1 else f'g{grid.group_size}'}"


def _block(module: str, prefix: str) -> str:
    return module.removeprefix(prefix + ".").split(".")[0]


def _norms(s: Sample) -> tuple[float, float, float]:
    return float(s.merged.norm()), float(s.delta.norm()), float(s.error.norm())


def _norm(parts: Sequence[float]) -> float:
    return float(torch.tensor(parts, dtype=torch.float64).norm())

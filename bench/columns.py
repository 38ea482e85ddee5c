"""Bench of the column kernels on a GPU: each alone, and whole solves by GPU and host time.

    python bench/columns.py [--rows 1024 7168 28672] [--shapes 1024x4096 7168x4096 1024x14336] [--out FILE]

Random weights and Hessians, W4 g128; milliseconds, of one call the median of some. "gpu": by events on the stream, all work
being started while the GPU is kept busy; "host": how long starting it took; "alone": from an idle GPU to the end. On a CPU it runs
with small --rows and --shapes, to see that it does, and all three are the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from factors import TRIES, hessian, milliseconds
from torch import Tensor

from requant.numerics import gptq, matmul_precision, triton_kernels
from requant.numerics.grid import Grid, Scales, find_scales
from requant.runtime.device import PROFILES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BUSY = 60_000_000  # clock ticks, some 35 ms, that the GPU is kept busy
GRID = Grid(4, 128)


def taken(work: Callable[[], object]) -> dict[str, float]:
    alone = milliseconds(work, DEVICE.type)
    if DEVICE.type != "cuda":
        return {"gpu": alone, "host": alone, "alone": alone}
    gpu, host = (sorted(seen)[TRIES // 2] for seen in zip(*(gpu_and_host(work) for _ in range(TRIES)), strict=True))
    return {"gpu": gpu, "host": host, "alone": alone}


def gpu_and_host(work: Callable[[], object]) -> tuple[float, float]:
    """(GPU, host) milliseconds of one call."""
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY)
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    start = time.perf_counter()
    work()
    host = 1e3 * (time.perf_counter() - start)
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended), host


def one_launch(rows: int) -> dict[str, Any]:
    """A block of columns: rounded in turn, and swept over."""
    k = PROFILES["cuda"].gptq_block
    weight, lower = torch.randn(k, rows, device=DEVICE), 0.05 * torch.randn(k, k, device=DEVICE)
    unit = lower.tril(-1) + torch.eye(k, device=DEVICE)
    inside = (unit @ unit.T).contiguous()
    scales = find_scales(weight.T, torch.ones(k, device=DEVICE), GRID)
    scale, zero = scales.scale.T.contiguous(), scales.zero.T.contiguous()
    group = torch.arange(k, device=DEVICE) // 128
    codes = torch.zeros(k, rows, dtype=torch.uint8, device=DEVICE)
    block = triton_kernels.Block(scale=scale, zero=zero, group=group, levels=16, error=weight.clone(), codes=codes)
    loop, sweep = (triton_kernels.round_columns, triton_kernels.sweep_columns) if triton_kernels.usable(weight) else (
        gptq._round_columns, gptq._sweep_columns)  # fmt: skip
    target, inverse = weight.clone(), 1 / inside.diagonal()
    return {
        f"{k} columns of {rows} rows, rounded": taken(lambda: loop(target, unit, block)),
        f"{k} columns of {rows} rows, swept": taken(lambda: sweep(target, inside, inverse, block)),
    }


def whole(rows: int, n: int) -> dict[str, Any]:
    """A weight [rows, n]: the column loop, and two sweeps."""
    weight, moments = torch.randn(rows, n, device=DEVICE), hessian(n, DEVICE.type)
    with matmul_precision.tensor_cores():
        factor = gptq.factorize(moments, torch.arange(n, device=DEVICE), 0.02)
        scales: Scales = find_scales(weight, moments.diagonal().clone(), GRID)
        codes, error = gptq.solve(weight, factor, scales, GRID)

        def refined() -> tuple[Tensor, Tensor]:
            gptq.refine(codes, error, moments, 0.02 * factor.mean, scales, GRID, 2)
            return codes, error

        return {
            f"{rows} x {n}, loop": taken(lambda: gptq.solve(weight, factor, scales, GRID)),
            f"{rows} x {n}, two sweeps": taken(refined),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 1536, 7168, 28672])
    parser.add_argument(
        "--shapes", nargs="+", default=["1024x4096", "7168x4096", "28672x4096", "1024x14336", "4096x14336"]
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for rows in args.rows:
        found |= one_launch(rows)
    for shape in args.shapes:
        rows, n = map(int, shape.split("x"))
        found |= whole(rows, n)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    result = {"date": time.strftime("%Y-%m-%d"), "device": name, "torch": torch.__version__, "milliseconds": found}
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

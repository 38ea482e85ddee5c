"""Bench on a GPU: factor a Hessian and solve with it, by a library and by blocks.

Milliseconds, and errors against fp64.

    python bench/factors.py [--sizes 4096 14336] [--columns 1024 4096] [--out FILE]

On a CPU it runs with small --sizes, to see that it does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from requant.numerics import cholesky

BLOCKS = (256, 512, 1024, 2048)
TRIES = 5


def milliseconds(work: Callable[[], object], device: str) -> float:
    """Milliseconds of one call: the median of several, the first left out."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    work()
    times = []
    for _ in range(TRIES):
        start = now()
        work()
        times.append(1e3 * (now() - start))
    return sorted(times)[TRIES // 2]


def hessian(n: int, device: str) -> Tensor:
    """A damped Hessian of random inputs, twice as many as columns."""
    x = torch.randn(2 * n, n, device=device)
    h = x.T @ x / len(x)
    h.diagonal().add_(0.02 * h.diagonal().mean())
    return h


def factoring(h: Tensor, device: str) -> dict[str, float]:
    def alone(_tensor: Tensor, _owner: int) -> Callable[[], None]:
        return lambda: None

    found = {"library": milliseconds(lambda: torch.linalg.cholesky_ex(h), device)}
    for block in (512, 1024):
        found[f"by blocks of {block}, one rank"] = milliseconds(
            lambda block=block: cholesky.shared_cholesky(h.clone(), 0, 1, alone, block), device
        )
    return found


def solving(lower: Tensor, columns: int, device: str) -> dict[str, Any]:
    wanted = torch.randn(len(lower), columns, device=device)
    few = wanted[:, :64].contiguous()
    exact = torch.cholesky_solve(few.double(), lower.double())

    def error(solved: Tensor) -> float:
        return float((solved - exact).norm() / exact.norm())

    return {
        "library": milliseconds(lambda: torch.cholesky_solve(wanted, lower), device),
        **{
            f"by blocks of {block}": milliseconds(
                lambda block=block: cholesky.solve(lower, wanted.clone(), block), device
            )
            for block in BLOCKS
        },
        "error of the library": error(torch.cholesky_solve(few, lower)),
        "error by blocks": error(cholesky.solve(lower, few.clone())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 14336])
    parser.add_argument("--columns", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "device": name, "torch": torch.__version__}
    torch.manual_seed(0)
    for n in args.sizes:
        h = hessian(n, device)
        lower = torch.linalg.cholesky(h)
        result[f"{n}: factor"] = factoring(h, device)
        for columns in args.columns:
            result[f"{n}: solve for {columns} columns"] = solving(lower, columns, device)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

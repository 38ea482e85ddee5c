"""What rounding keeps of a small low-rank delta on a dequantized NF4 base.

By delta size and grid.

    python bench/resonance.py > bench/results/DATE-resonance-cpu.json

Retention <Q - D, dW> / <dW, dW> with Q = round(D + dW), as `requant.run.check.delta_prediction` predicts it, and beside it
<Q(D + dW) - Q(D), dW> / <dW, dW>. Gaussian weights, NF4 in blocks of 64 with double quantization, dW of rank 16.
"""

from __future__ import annotations

import json
import platform
import sys

import torch

from requant.numerics import nf4
from requant.numerics.grid import Grid
from requant.run.check.delta_prediction import Sample, retention, rounded

SIZE = 1024
SHARES = (0.003, 0.01, 0.03, 0.1)
GRIDS = {
    "4-bit g64 min-max": Grid(4, 64, search="minmax"),
    "4-bit g128 min-max": Grid(4, 128, search="minmax"),
    "4-bit g128 asymmetric min-max": Grid(4, 128, symmetric=False, search="minmax"),
    "4-bit g32 searched": Grid(4, 32),
    "4-bit g64 searched": Grid(4, 64),
    "4-bit g128 searched": Grid(4, 128),
    "4-bit g64 searched, signed": Grid(4, 64, signed=True),
    "8-bit g64 searched": Grid(8, 64),
}


def main() -> None:
    """Print JSON."""
    torch.manual_seed(0)
    base = nf4.round_trip(torch.randn(SIZE, SIZE) * 0.02, "nf4", 64, double_quant=True)
    rows = []
    for share in SHARES:
        delta = torch.randn(SIZE, 16) @ torch.randn(16, SIZE)
        delta *= share * base.norm() / delta.norm()
        for name, grid in GRIDS.items():
            change = rounded(base + delta, grid) - rounded(base, grid)
            rows.append({
                "delta": share, "grid": name, "retention": retention([Sample("", base + delta, delta, grid)]),
                "of the change": float((change * delta).sum() / (delta * delta).sum()),
            })  # fmt: skip
            print(rows[-1], file=sys.stderr)
    print(json.dumps({"torch": torch.__version__, "machine": platform.machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

"""Bench of rounding embeddings and a head: error and CPU seconds by bits, group, search.

    python bench/ends.py [--rows 4096] [--width 512] [--out FILE]

Values are random, normal and with the tails of Student's t with four degrees of freedom, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from requant.numerics.grid import Grid, nearest_rows

GROUPS, SEARCHES = (32, 64, 128), ("minmax", "hessian")


def values(kind: str, rows: int, width: int) -> torch.Tensor:
    torch.manual_seed(0)
    drawn = torch.randn(rows, width) if kind == "normal" else torch.distributions.StudentT(4.0).sample((rows, width))
    return drawn.bfloat16()


def row(kind: str, weight: torch.Tensor, bits: int, group: int) -> dict[str, float | str]:
    """Relative errors with both ways to find scales, and the CPU seconds of a million values."""
    found: dict[str, float | str] = {"values": kind, "bits": bits, "group": group}
    for search in SEARCHES:
        began = time.process_time()
        rounded = nearest_rows(weight, Grid(bits, group, search=search))  # type: ignore[arg-type]
        seconds = (time.process_time() - began) / weight.numel() * 1e6
        error = (rounded - weight.float()).norm() / weight.float().norm()
        found |= {f"{search} error": round(float(error), 5), f"{search} seconds": round(seconds, 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = []
    for kind in ("normal", "student t"):
        weight = values(kind, asked.rows, asked.width)
        for bits in (8, 4):
            for group in GROUPS:
                rows.append(row(kind, weight, bits, group))
                print(rows[-1], flush=True)
    if asked.out:
        asked.out.write_text(json.dumps({"versions": {"torch": torch.__version__}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

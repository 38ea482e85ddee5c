"""Symmetric and asymmetric grids, damping, steps and rates: unhealed and healed.

    python bench/heal_grids.py --base BASE --adapter ADAPTER --texts TEXTS --out FILE --samples 128 --length 1024
                               [--bits 4,3,2] [--only "plain;asymmetric"] [--healing no|only] [--steps 600]

A row for each way at each width, unhealed and healed. --only: these ways, split by ; (--list prints all). --healing: no
healed rows, or healed ones only. FILE is written over after every row. BASE, ADAPTER and TEXTS as a recipe's prepare.py
makes them; held-out sets, healing text and teacher are those of bench/heal.py. Meant for a GPU; runs anywhere.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from heal import BOTH, heal_whole
from heal_lab import DEVICE, HALF, Bench, phase

from requant import quantize
from requant.heal import teacher
from requant.heal.changes import scale_changes
from requant.heal.settings import HealSettings
from requant.heal.stage import write
from requant.numerics.grid import Grid
from requant.quantize import plan as layout


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to quantize and heal. steps: factor on those asked for."""

    damp: float | None = None
    symmetric: bool = True
    steps: float = 1.0
    heal: dict[str, Any] = field(default_factory=dict)


HALF_RATES = {"lr": 0.5 * HealSettings().lr, "code_lr": 0.5 * HealSettings().code_lr}
WAYS: dict[str, Way] = {
    "plain": Way(),
    "damp 0.1": Way(damp=0.1),
    "asymmetric": Way(symmetric=False),
    "half the steps": Way(steps=0.5),
    "twice the steps": Way(steps=2),
    "three times the steps": Way(steps=3),
    "half the rates": Way(heal=HALF_RATES),
    "half the rates, twice the steps": Way(heal=HALF_RATES, steps=2),
}


class Grids:
    """The bench of `heal_lab`, whose checkpoint each way makes for itself."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.bench = args, Bench(args)
        self.taught: teacher.ResidentTeacher | None = None

    def quantized(self, name: str, bits: int, way: Way) -> Path:
        out = self.bench.work / name.replace(" ", "-")
        out.mkdir()
        grid = Grid(bits, 64, symmetric=way.symmetric)
        settings = layout.Settings(grid=grid, order="auto", sweeps=2, correct=0.5, damp=way.damp)
        quantize.quantize(
            self.bench.merged, out, self.bench.calibration(), settings, dtype=torch.bfloat16, device=DEVICE
        )
        return out

    def row(self, bits: int, name: str, way: Way) -> None:
        full, bench = f"{bits} bits, {name}", self.bench
        with phase(f"{full}: quantize", bench.seconds):
            path = self.quantized(full, bits, way)
        if self.args.healing != "only" and way.steps == 1 and not way.heal:
            bench.add({"row": full} | bench.losses(path))
        if self.args.healing != "no":
            self.healed(full, path, way)

    def healed(self, full: str, path: Path, way: Way) -> None:
        bench = self.bench
        steps = max(1, round(self.args.steps * way.steps))
        settings = replace(
            HealSettings(steps=steps, batch=self.args.batch, length=self.args.window, tune=BOTH), **way.heal
        )
        with phase(f"{full}: heal", bench.seconds):
            text = bench.windows(settings, HALF)
            if self.taught is None:
                self.taught = teacher.ResidentTeacher(bench.model("merged"), text.windows, DEVICE)
            self.taught.windows = text.windows
            row, values = heal_whole(bench, path, settings, self.taught, text, self.args.batch)
        written = bench.work / f"{path.name}-healed"
        written.mkdir()
        write(path, written, values, {"healer": ["bench"]})
        bench.add({"row": f"{full}, healed"} | bench.losses(written) | row | dict(scale_changes(path, values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "texts", "out"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/requant-heal-grids"))
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--only", default="", help="names of ways, split by ;")
    parser.add_argument("--healing", choices=("both", "no", "only"), default="both")
    parser.add_argument("--list", action="store_true", help="print the names of all ways")
    parser.add_argument("--eager", action="store_true", help="launch the kernels of a step one by one")
    parser.add_argument("--share", type=float, default=0.5, help="of the calibration windows that are in-domain")
    numbers = {"samples": 128, "length": 1024, "steps": 600, "batch": 16, "window": 512, "tokens": None, "written": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.list:
        print("\n".join(WAYS))
        return
    chosen = [part.strip() for part in args.only.split(";") if part.strip()] or list(WAYS)
    if unknown := [name for name in chosen if name not in WAYS]:
        parser.error(f"--only: no way is called {unknown[0]!r}: expected some of {'; '.join(WAYS)}")
    lab = Grids(args)
    for name in chosen:
        for bits in args.bits.split(","):
            lab.row(int(bits), name, WAYS[name])


if __name__ == "__main__":
    main()

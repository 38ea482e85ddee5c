"""Hessians weighted by the end loss, asymmetric grids, more steps: unhealed and healed.

    python bench/end_loss.py --base BASE --adapter ADAPTER --texts TEXTS --out FILE --samples 128 --length 1024
                             [--bits 4,3,2] [--only "plain;signs, 0.5"] [--healing no|only] [--steps 600]

A row for each way at each width, unhealed and healed. --only: these ways, split by ; (--list prints all). --healing: no
healed rows, or healed ones only. FILE is written over after every row. BASE, ADAPTER and TEXTS as a recipe's prepare.py
makes them; held-out sets, healing text and teacher are those of bench/heal.py. Meant for a GPU; runs anywhere.

Ways: "plain" counts every token alike. "signs", "sampled" and "text" weight a token by the squared gradient at the
linear's output, with the three kinds of labels of `requant.quantize.token_weights`, raised to the power that follows.
"half even": averaged with 1. "own": each linear has a Hessian of its own, also where linears share their input.
"asymmetric": zero points that GPTQ searches. The last ones are healed with other steps or rates than the default.
"""

from __future__ import annotations

import argparse
import statistics
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
from requant.quantize.token_weights import TokenWeights, effective_share, squared_gradients, tempered


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to quantize and heal. labels: None: no weights. even: share of a weight that is the same for all tokens.

    steps: factor on those asked for.
    """

    labels: Any = None
    power: float = 1.0
    even: float = 0.0
    damp: float | None = None
    shared: bool = True
    passes: int = 1
    symmetric: bool = True
    steps: float = 1.0
    heal: dict[str, Any] = field(default_factory=dict)


HALF_RATES = {"lr": 0.5 * HealSettings().lr, "code_lr": 0.5 * HealSettings().code_lr}
WAYS: dict[str, Way] = {
    "plain": Way(),
    "signs, 1": Way(labels="signs"),
    "signs, 0.5": Way(labels="signs", power=0.5),
    "signs, 0.25": Way(labels="signs", power=0.25),
    "signs, 1, half even": Way(labels="signs", even=0.5),
    "signs, 0.5, half even": Way(labels="signs", power=0.5, even=0.5),
    "signs, 0.5, damp 0.1": Way(labels="signs", power=0.5, damp=0.1),
    "plain, damp 0.1": Way(damp=0.1),
    "signs, 0.5, 4 passes": Way(labels="signs", power=0.5, passes=4),
    "signs, 1, own": Way(labels="signs", shared=False),
    "signs, 0.5, own": Way(labels="signs", power=0.5, shared=False),
    "sampled, 0.5": Way(labels="sampled", power=0.5),
    "text, 0.5": Way(labels="text", power=0.5),
    "asymmetric": Way(symmetric=False),
    "asymmetric, signs, 0.5": Way(symmetric=False, labels="signs", power=0.5),
    "half the steps": Way(steps=0.5),
    "twice the steps": Way(steps=2),
    "three times the steps": Way(steps=3),
    "half the rates": Way(heal=HALF_RATES),
    "half the rates, twice the steps": Way(heal=HALF_RATES, steps=2),
}


class EndLoss:
    """The bench of `heal_lab`, with weights of its calibration tokens."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.bench = args, Bench(args)
        self.squares: dict[tuple[Any, int], dict[str, torch.Tensor]] = {}
        self.taught: teacher.ResidentTeacher | None = None
        self.effective: dict[str, float] = {}  # share of the tokens that the last weights leave, by kind of linear

    def weights(self, way: Way) -> TokenWeights | None:
        self.effective = {}
        if way.labels is None:
            return None
        key = way.labels, way.passes
        if key not in self.squares:
            with phase(f"gradients of {way.labels}, {way.passes} passes", self.bench.seconds):
                self.squares[key] = self.measured(way)
        weights = tempered(self.squares[key], way.power)
        by_linear = {name: value.mul(1 - way.even).add(way.even) for name, value in weights.items()}
        shares: dict[str, list[float]] = {}
        for name, value in by_linear.items():
            shares.setdefault(name.rsplit(".", 1)[1], []).append(effective_share(value))
        self.effective = {name: round(statistics.fmean(own), 3) for name, own in shares.items()}
        print(f"  effective share of the tokens: {self.effective}")
        return TokenWeights(by_linear=by_linear, shared=way.shared)

    def measured(self, way: Way) -> dict[str, torch.Tensor]:
        """From the merged model in fp32: gradients of fp16 would vanish."""
        from requant.evaluate import variants

        model = variants.load("merged", self.bench.sources, device=DEVICE, dtype=torch.float32)
        names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")]
        windows = self.bench.calibration()
        batch = 4 if DEVICE.type == "cuda" else 1
        return squared_gradients(model, windows, names, labels=way.labels, passes=way.passes, batch=batch)

    def quantized(self, name: str, bits: int, way: Way) -> Path:
        out = self.bench.work / name.replace(" ", "-")
        out.mkdir()
        grid = Grid(bits, 64, symmetric=way.symmetric)
        settings = layout.Settings(grid=grid, order="auto", sweeps=2, correct=0.5, damp=way.damp)
        quantize.quantize(
            self.bench.merged, out, self.bench.calibration(), settings, dtype=torch.bfloat16, device=DEVICE,
            token_weights=self.weights(way),
        )  # fmt: skip
        return out

    def row(self, bits: int, name: str, way: Way) -> None:
        full, bench = f"{bits} bits, {name}", self.bench
        with phase(f"{full}: quantize", bench.seconds):
            path = self.quantized(full, bits, way)
        if self.args.healing != "only" and way.steps == 1 and not way.heal:
            bench.add({"row": full} | bench.losses(path) | {"effective": self.effective})
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
    parser.add_argument("--work", type=Path, default=Path("/tmp/requant-end-loss"))
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
    lab = EndLoss(args)
    for name in chosen:
        for bits in args.bits.split(","):
            lab.row(int(bits), name, WAYS[name])


if __name__ == "__main__":
    main()

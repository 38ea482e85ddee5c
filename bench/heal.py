"""What healing gives back on a fine-tune, and which settings help.

    python bench/heal.py compare --base BASE --adapter ADAPTER --texts TEXTS --out FILE [--bits 4,3] [--peer]
                         [--autoround 200,1000] [--codes] [--code-lr 0.001] [--steps 300]
    python bench/heal.py ablate --base BASE --adapter ADAPTER --texts TEXTS --out FILE [--only NAME;NAME]
                         [--budget SECONDS]

compare: NF4 base + adapter -> merged -> GPTQ (ours, and with --peer gptqmodel's, with --autoround AutoRound's)
-> healed; all scored in fp32 on both held-out sets. ablate: one checkpoint, many settings, nothing loaded twice. FILE
is rewritten after every row, and every phase says its seconds. BASE, ADAPTER and TEXTS as a recipe's prepare.py makes
them: recipes/smollm2-pydocs, recipes/gemma3-word-problems. Meant for a GPU; runs anywhere.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from heal_lab import DEVICE, HALF, Bench, SignedCodes, peak, phase, reset_peak, sync

from requant.data.healing_text import HealingText
from requant.heal import blockwise, student, teacher
from requant.heal.captured_steps import CapturedSteps
from requant.heal.changes import code_changes, scale_changes
from requant.heal.curve import LossCurve
from requant.heal.end_to_end import EndToEndLoss
from requant.heal.job import HealJob
from requant.heal.plan import HealPlan
from requant.heal.settings import HealSettings
from requant.heal.stage import write
from requant.heal.trainer import Trainer, rate_groups


class ByRow(torch.optim.Optimizer):
    """Adam with one second moment for all scales of a row.

    Inside a row, steps are in proportion to the gradients.
    """

    def __init__(self, pupil: student.Student, settings: HealSettings, first: float = 0.9) -> None:
        super().__init__(rate_groups(pupil, settings), {"lr": settings.lr})
        self.pupil, self.first, self.count = pupil, first, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        rate = self.param_groups[0]["lr"] / (1 - self.first**self.count)
        for moving in self.pupil.trainable:
            state = self.state[moving.offset]
            mean = state.setdefault("mean", torch.zeros_like(moving.offset))
            mean.lerp_(moving.offset.grad, 1 - self.first)
            for name in moving.parts:
                now = moving.view(moving.offset.grad, name).square().mean(dim=-1, keepdim=True)
                square = state.setdefault(name, torch.zeros_like(now)).lerp_(now, 0.001)
                root = (square / (1 - 0.999**self.count)).sqrt().clamp_min(1e-12)
                moving.view(moving.offset, name).sub_(rate * moving.view(mean, name) / root)


Optimizer = Callable[[student.Student, HealSettings], torch.optim.Optimizer]


def adam(*betas: float) -> Optimizer:
    return lambda pupil, settings: torch.optim.AdamW(rate_groups(pupil, settings), betas=betas, foreach=False)  # type: ignore[arg-type]


def eight_bits(pupil: student.Student, settings: HealSettings) -> torch.optim.Optimizer:
    """AdamW with moments of 8 bits, of bitsandbytes."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(rate_groups(pupil, settings), lr=settings.lr)


OPTIMIZERS: dict[str, Optimizer] = {
    "slow": adam(0.97, 0.999),
    "by row": ByRow,
    "8-bit": eight_bits,
    "signs": SignedCodes,
}
BOTH = ("scales", "codes")
WRITTEN = (0.34, 0.33, 0.33)

# name: (changes of the default settings, shares of the two texts and of text that the merged model wrote, teacher)
ABLATIONS: dict[str, tuple[dict[str, Any], tuple[float, float, float], str]] = {
    "default": ({}, HALF, "merged"),
    "+ norms": ({"tune": ("scales", "norms")}, HALF, "merged"),
    "lr 2e-2": ({"lr": 2e-2}, HALF, "merged"),
    "lr 7e-3": ({"lr": 7e-3}, HALF, "merged"),
    "lr 5e-3, 240 steps": ({"lr": 5e-3, "steps": 240}, HALF, "merged"),
    "lr 5e-3": ({"lr": 5e-3}, HALF, "merged"),
    "a third written": ({}, WRITTEN, "merged"),
    "two thirds in-domain": ({}, (0.67, 0.33, 0.0), "merged"),
    "target adapter": ({}, HALF, "adapter"),
    "50 steps": ({"steps": 50}, HALF, "merged"),
    "batch 4": ({"batch": 4}, HALF, "merged"),
    "block by block": ({"mode": "blocks", "steps": 50}, HALF, "merged"),
    "in-domain text only": ({}, (1.0, 0.0, 0.0), "merged"),
    "general text only": ({}, (0.0, 1.0, 0.0), "merged"),
    "seed 1": ({"seed": 1}, HALF, "merged"),
    "by row, lr 5e-3": ({"optimizer": "by row", "lr": 5e-3}, HALF, "merged"),
    "by row, lr 1e-2": ({"optimizer": "by row", "lr": 1e-2}, HALF, "merged"),
    "first moment 0.97": ({"optimizer": "slow"}, HALF, "merged"),
    "first moment 0.97, lr 1e-2": ({"optimizer": "slow", "lr": 1e-2}, HALF, "merged"),
    "500 steps": ({"steps": 500}, HALF, "merged"),
    "codes": ({"tune": BOTH}, HALF, "merged"),
    "codes, 8-bit Adam": ({"tune": BOTH, "optimizer": "8-bit"}, HALF, "merged"),
    "codes, signs": ({"tune": BOTH, "optimizer": "signs"}, HALF, "merged"),
    "codes, signs, rate 3e-3": ({"tune": BOTH, "optimizer": "signs", "code_lr": 3e-3}, HALF, "merged"),
    "codes, signs, rate 3e-4": ({"tune": BOTH, "optimizer": "signs", "code_lr": 3e-4}, HALF, "merged"),
    "codes, rate 3e-3": ({"tune": BOTH, "code_lr": 3e-3}, HALF, "merged"),
    "codes, rate 3e-4": ({"tune": BOTH, "code_lr": 3e-4}, HALF, "merged"),
    "codes, lr 1e-2": ({"tune": BOTH, "lr": 1e-2}, HALF, "merged"),
    "codes, from the middle of their cells": ({"tune": BOTH, "middle": True}, HALF, "merged"),
    "codes, twice the steps": ({"tune": BOTH, "steps": 300}, HALF, "merged"),
    "codes, a third written": ({"tune": BOTH}, WRITTEN, "merged"),
    "codes, half written": ({"tune": BOTH}, (0.15, 0.35, 0.5), "merged"),
    "codes, signs, a third written": ({"tune": BOTH, "optimizer": "signs"}, WRITTEN, "merged"),
    "codes alone": ({"tune": ("codes",)}, HALF, "merged"),
    "scales, block by block": ({"mode": "blocks"}, HALF, "merged"),
    "codes, block by block": ({"mode": "blocks", "tune": BOTH}, HALF, "merged"),
    "codes, block by block, then scales": ({"mode": "blocks+whole", "tune": BOTH}, HALF, "merged"),
}


def base_settings(args: argparse.Namespace) -> HealSettings:
    tune = BOTH if args.codes else ("scales",)
    return HealSettings(
        steps=args.steps, batch=args.batch, length=args.window, lr=args.lr, code_lr=args.code_lr, tune=tune
    )


def heal_whole(
    bench: Bench, path: Path, settings: HealSettings, taught: Any, text: HealingText, micro: int,
    optimizer: Optimizer | None = None, middle: bool = False, start: Mapping[str, torch.Tensor] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:  # fmt: skip
    """Heal in memory: (row, best values). start: values in place of the checkpoint's."""
    reset_peak()
    sync()
    started = time.perf_counter()
    pupil = student.load(
        path, device=DEVICE, dtype=teacher.product_dtype(DEVICE), tune=settings.tune,
        original=None if middle else bench.merged, start=start,
    )  # fmt: skip
    loading = time.perf_counter() - started
    loss = EndToEndLoss(pupil, taught, text, DEVICE)
    trained = Trainer(
        pupil, loss, loss.measure, settings, train=text.train, choosing=text.choosing, judging=text.judging,
        sources=text.held_out_sources, micro_batch=micro,
        captured=CapturedSteps(loss) if DEVICE.type == "cuda" and not bench.args.eager else None,
    )  # fmt: skip
    if optimizer:
        trained.optimizer = optimizer(pupil, settings)
    curve = trained.run(None)
    sync()
    row = {"seconds": round(time.perf_counter() - started, 2), "loading": round(loading, 2), "peak_gb": peak()}
    row |= {"reads": dict(zip(text.names, text.reads, strict=True))}
    values = pupil.values()
    return row | facts(curve) | {"codes": code_changes(path, values)}, values


def facts(curve: LossCurve) -> dict[str, Any]:
    return {
        "kl_start": curve.held_out[0].mean_kl, "kl_best": curve.best.mean_kl, "best_step": curve.best.steps,
        "gained": curve.gained, "stopped": curve.stopped,
        "held": [(look.steps, look.kl, look.loss) for look in curve.held_out], "train": [round(v, 5) for v in curve.train],
    }  # fmt: skip


def compare(args: argparse.Namespace) -> None:
    """Unhealed and healed, ours and the peer's, at each width."""
    bench = Bench(args)
    settings = base_settings(args)
    text = bench.windows(settings, WRITTEN if args.third_written else HALF)
    taught = teacher.ResidentTeacher(bench.model("merged"), text.windows, DEVICE)
    for bits in [int(b) for b in args.bits.split(",")]:
        makers: list[tuple[str, Callable[[int], Path]]] = [("ours", bench.quantized)]
        makers += [("gptqmodel", bench.peer)] if args.peer else []
        for count in [int(n) for n in args.autoround.split(",") if n]:
            makers.append((f"AutoRound, {count} iterations,", partial(bench.peer, iterations=count)))
        for maker, make in makers:
            with phase(f"{maker} {bits} bits: quantize", bench.seconds):
                path = make(bits)
            bench.add({"checkpoint": f"{maker} {bits} bits", "healed": False} | bench.losses(path))
            if maker != "ours" and not args.heal_peer:
                continue
            with phase(f"{maker} {bits} bits: heal", bench.seconds):
                row, values = heal_whole(bench, path, settings, taught, text, args.micro or args.batch)
            written = bench.work / f"{path.name}-healed"
            written.mkdir()
            write(path, written, values, {"healer": ["bench"]})
            loss = bench.losses(written)
            bench.add(
                {"checkpoint": f"{maker} {bits} bits", "healed": True} | loss | row | dict(scale_changes(path, values))
            )


def ablate(args: argparse.Namespace) -> None:
    """Every setting alone, from the same checkpoint; stops before the budget is spent."""
    started = time.perf_counter()
    bench = Bench(args)
    with phase("quantize", bench.seconds):
        path = args.checkpoint or bench.quantized(int(args.bits.split(",")[0]))
    bench.add({"setting": "unhealed"} | bench.losses(path))
    taught: dict[str, Any] = {}
    rate = 0.0
    for name, (changes, shares, target) in ABLATIONS.items():
        if args.only and name not in args.only.split(";"):
            continue
        own = dict(changes)
        mode, optimizer, middle = own.pop("mode", "whole"), own.pop("optimizer", None), own.pop("middle", False)
        factor = {k: getattr(args, k) / v for k, v in (("steps", 150), ("batch", 16))}
        for key in factor.keys() & own.keys():
            own[key] = max(1, round(own[key] * factor[key]))
        settings = replace(base_settings(args), **own)
        left = args.budget - (time.perf_counter() - started)
        if rate * settings.steps * settings.batch > left:
            print(f"  {name}: left out, {left:.0f} s left", flush=True)
            continue
        text = bench.windows(settings, shares)
        with phase(name, bench.seconds):
            row, values, rest = {}, {}, settings
            if mode != "whole":
                row, values = heal_blocks(bench, path, settings, text, args.micro or args.batch)
                row, rest = {"first": row} | row, replace(settings, tune=("scales",))
            if mode != "blocks":
                if target not in taught:
                    taught[target] = teacher.ResidentTeacher(bench.model(target), text.windows, DEVICE)
                taught[target].windows = text.windows
                last, later = heal_whole(
                    bench, path, rest, taught[target], text, args.micro or settings.batch,
                    OPTIMIZERS.get(optimizer), middle, values,
                )  # fmt: skip
                row, values = row | last, {**values, **later}
                rate = last["seconds"] / (settings.steps * settings.batch)
            loss = bench.losses(path, values)
        bench.add({"setting": name} | loss | row | {"settings": asdict(settings)})


def heal_blocks(
    bench: Bench, path: Path, settings: HealSettings, text: HealingText, micro: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reset_peak()
    started = time.perf_counter()
    state = bench.work / "state"
    state.mkdir(exist_ok=True)
    job = HealJob(
        source=path,
        teacher=bench.merged,
        load_teacher=lambda _: bench.model("merged"),
        text=text,
        settings=settings,
        plan=HealPlan(mode="blocks", teacher_resident=False, recompute=False, micro_batch=micro),
        device=DEVICE,
        work=state,
        key=str(time.time()),
    )
    values, curve, blocks = blockwise.heal_blocks(job)
    row = {"seconds": round(time.perf_counter() - started, 2), "peak_gb": peak()} | facts(curve)
    return row | {"blocks": blocks}, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("compare", "ablate"))
    for name in ("base", "adapter", "texts", "out", "checkpoint"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/requant-heal"))
    parser.add_argument("--bits", default="4")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--autoround", default="", help="iterations of AutoRound, split by commas: a peer each")
    parser.add_argument("--heal-peer", action="store_true", help="heal gptqmodel's checkpoint too")
    parser.add_argument("--only", default="", help="names of rows, split by ;")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds")
    parser.add_argument(
        "--third-written", action="store_true", help="a third of the text is what the merged model wrote"
    )
    parser.add_argument("--eager", action="store_true", help="launch the kernels of a step one by one")
    parser.add_argument("--codes", action="store_true", help="train the codes too")
    parser.add_argument("--lr", type=float, default=HealSettings().lr)
    parser.add_argument("--code-lr", type=float, default=HealSettings().code_lr)
    parser.add_argument("--share", type=float, default=0.5, help="of the calibration windows that are in-domain")
    numbers = {
        "samples": 48,
        "length": 512,
        "steps": 150,
        "batch": 16,
        "window": 512,
        "micro": None,
        "tokens": None,
        "written": 1024,
    }
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    started = time.perf_counter()
    {"compare": compare, "ablate": ablate}[args.role](args)
    print(f"{time.perf_counter() - started:.1f} s in all", flush=True)


if __name__ == "__main__":
    main()

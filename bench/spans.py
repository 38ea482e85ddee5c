"""Timeline of the host while a GPU quantizes: begin and length of our calls, of each rank.

Without torch's profiler.

    python bench/spans.py [--layers 4] [--samples 512] [--shape llama-3-8b] [--compiled] [--least 15] [--scratch DIR] [--out FILE]
    torchrun --standalone --nproc-per-node 4 bench/spans.py --scratch DIR --out FILE    (FILE.0, FILE.1 ...: one a rank)

The model is random (as in bench/speed.py). What other threads do is marked so. Blocks alone are on the last line: ranks
wait for each other, so who is late shows in who does not wait ("sum", "all_reduce").
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gaps
import speed
import watched
from random_models import SHAPES

NAMES = gaps.NAMES | {
    "modeling.skeleton.build": "skeleton",
    "quantize.plan.plan": "plan",
    "quantize.calibration_plan.plan_calibration": "plan calibration",
    "quantize.calibration_plan.CalibrationPlan.reserve": "reserve",
    "quantize.background_writer.BackgroundWriter.__init__": "Written",
    "modeling.block_walk.Walk.embed_all": "embed",
    "modeling.block_walk.Walk._read": "read",
    "modeling.block_walk.Walk.load": "load",
    "modeling.block_walk.Walk._capture": "capture",
    "modeling.block_walk.Walk._record": "record",
    "modeling.block_walk.Walk._read_ahead": "read ahead",
    "quantize.warmup.WarmUp.wait": "wait for kernels",
    "quantize.warmup.WarmUp.wait_all": "wait for later kernels",
    "modeling.fused_ops.FusedOps.try_out": "try_out",
    "modeling.linear_groups.find_linear_groups": "find_linear_groups",
    "runtime.ranks.DistributedRanks.broadcast": "ranks.broadcast",
    "runtime.ranks.DistributedRanks.all": "ranks.all",
    "runtime.interpreter.freeze_garbage_collector": "freeze collector",
    "quantize.background_writer.BackgroundWriter.settle": "settle",
    "quantize.background_writer.BackgroundWriter.close": "close",
}


class Spans:
    """Begin and length of each call, seconds since `began`."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, int, str]] = []
        self.depth, self.began = 0, time.perf_counter()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        mine = threading.current_thread() is threading.main_thread()
        depth, start = self.depth, time.perf_counter()
        self.depth += mine
        try:
            yield
        finally:
            self.depth -= mine
            took = time.perf_counter() - start
            self.seen.append(
                (start - self.began, took, depth, name) if mine else (start - self.began, took, 0, f"thread: {name}")
            )

    def lines(self, least: float) -> list[str]:
        blocks = [took for _, took, _, name in sorted(self.seen) if name == "block"]
        return [
            *(
                f"{at:8.3f} {took:7.3f} {'  ' * depth}{name}"
                for at, took, depth, name in sorted(self.seen)
                if took >= least
            ),
            "blocks: " + " ".join(f"{b:.3f}" for b in blocks),
        ]


def measured(args: argparse.Namespace, model: Path, work: Path, ranks: Any) -> list[str]:
    import torch

    from requant import quantize

    device = ranks.device_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    torch.zeros(1, device=device)
    settings = speed.settings_of(argparse.Namespace(group=args.group, sweeps=2, correct=0.5))
    if args.compiled:
        speed.compile_ahead(argparse.Namespace(model=model, shape=args.shape), settings, device, ranks)
    spans = Spans()
    watched.watch(NAMES, spans.span)
    ranks.all(True)
    spans.began = time.perf_counter()
    quantize.quantize(model, work, speed.windows(args), settings, dtype=torch.bfloat16, device=device, ranks=ranks)
    seconds = time.perf_counter() - spans.began
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    head = f"{time.strftime('%Y-%m-%d')}, rank {ranks.rank} of {ranks.count}, {name}, torch {torch.__version__}, {seconds:.2f} s"
    return [head, *spans.lines(args.least / 1e3)]


def main() -> None:
    parser = gaps.arguments(__doc__)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--least", type=float, default=15, help="milliseconds of a call that is shown")
    parser.add_argument("--compiled", action="store_true", help="kernels are compiled before the clock starts")
    args = parser.parse_args()
    SHAPES[args.shape].import_model()

    with speed.launched_ranks() as ranks, gaps.places(args, ranks, parser) as (model, work):
        text = "\n".join(measured(args, model, work, ranks))
        if ranks.first:
            print(text)
        if args.out:
            args.out.with_name(args.out.name + (f".{ranks.rank}" if ranks.count > 1 else "")).write_text(text + "\n")
        ranks.all(True)


if __name__ == "__main__":
    main()

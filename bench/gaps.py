"""Where a steady block's time on a GPU goes: our kernels, collectives, idle gaps.

Kernels are listed by the function of ours that launched them.

    python bench/gaps.py [--layers 4] [--samples 512] [--shape llama-3-8b] [--scratch DIR] [--out FILE]
    torchrun --standalone --nproc-per-node 2 bench/gaps.py --scratch DIR --out FILE    (FILE.0, FILE.1: one for each rank)

The next to last block of a random model (as in bench/speed.py) is looked at, between the moments when the host begins it and
the one after. torch's profiler slows the host down, so gaps where the GPU waits for it are wider than without.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import random_models
import speed
import watched

GAPS = 25  # of the widest that are shown
KERNELS = 40


NAMES = {  # of ours -> as shown
    "quantize.block_quantizer.Quantizer.block": "block",
    "quantize.block_quantizer.Quantizer._solve_group": "_stage",
    "quantize.block_quantizer.Quantizer._keep": "_keep",
    "quantize.block_quantizer.Quantizer.commit_block": "commit block",
    "quantize.module_results.BlockResults.send": "send costs",
    "numerics.gptq.factorize": "factorize",
    "numerics.grid.find_scales": "find_scales",
    "numerics.gptq.solve": "solve",
    "numerics.gptq.refine": "refine",
    "numerics.gptq.row_errors": "row_errors",
    "numerics.gptq._rounding_errors": "_rounding_errors",
    "numerics.hessian.symmetrize": "symmetrize",
    "numerics.hessian.add_to_hessian": "add_to_hessian",
    "numerics.hessian.add_drift": "add_drift",
    "numerics.hessian.gather": "moments",
    "runtime.ranks.DistributedRanks.all_reduce": "ranks.all_reduce",
    "runtime.ranks.DistributedRanks.all_gather_rows": "ranks.all_gather_rows",
    "runtime.ranks.DistributedRanks.sum": "ranks.sum",
    "quantize.solve.cholesky_of": "factored by ranks",
    "quantize.out_of_memory.follow": "follow",
    "quantize.error_correction.Correction.corrected": "correction",
    "quantize.error_correction.Correction.__init__": "pulled",
    "quantize.solve.gather": "solution to all ranks",
    "modeling.paused_batches._continue": "forward",
}


def profiled(args: argparse.Namespace, model: Path, work: Path, ranks: Any) -> tuple[list[Any], Any]:
    """(events of a whole quantization, this rank's device)."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from requant import quantize

    device = ranks.device_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    torch.zeros(1, device=device)
    ranks.all(True)
    settings = speed.settings_of(argparse.Namespace(group=128, sweeps=2, correct=0.5))
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    watched.watch(NAMES, lambda name: record_function(f"ours: {name}"))
    with profile(activities=kinds) as seen:
        quantize.quantize(model, work, speed.windows(args), settings, dtype=torch.bfloat16, device=device, ranks=ranks)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return list(seen.profiler.kineto_results.events()), device


def look(events: list[Any]) -> dict[str, Any]:
    """Milliseconds of one block."""
    from torch.autograd import DeviceType

    host = [e for e in events if e.device_type() == DeviceType.CPU]
    blocks = sorted((e.start_ns(), end(e)) for e in host if e.name() == "ours: block")
    start, stop = blocks[-2][0], blocks[-1][0]
    mine = sorted((e.start_ns(), end(e), e.name()[6:]) for e in host if e.name().startswith("ours: "))
    begins = [m[0] for m in mine]

    def caller(at: int | None) -> str:
        if at is None:
            return "not known"
        for i in range(bisect_right(begins, at) - 1, -1, -1):  # the innermost began last
            _, ended, name = mine[i]
            if at <= ended and name != "block":
                return name
        return "outside of these"

    launched = {e.correlation_id(): e.start_ns() for e in host if e.correlation_id() and e.name().startswith("cu")}
    work = [e for e in events if e.device_type() != DeviceType.CPU and not e.name().startswith(("ours: ", "nccl:"))]
    work = sorted((e for e in work if e.start_ns() < stop and end(e) > start), key=lambda e: e.start_ns())
    busy: Counter[int] = Counter()
    for e in work:
        busy[e.device_resource_id()] += e.duration_ns()
    main = busy.most_common(1)[0][0] if busy else None
    on_main = [e for e in work if e.device_resource_id() == main]
    by_caller, by_kernel = Counter[str](), Counter[str]()
    for e in on_main:
        by_caller[caller(launched.get(e.linked_correlation_id(), launched.get(e.correlation_id())))] += e.duration_ns()
        by_kernel[e.name()[:90]] += e.duration_ns()
    gaps = [(length, caller(middle), before) for length, middle, before in between(on_main, start)]
    idle = Counter[str]()
    for length, name, _ in gaps:
        idle[name] += length
    return {
        "block": (stop - start) / 1e6,
        "blocks, by the host": [(b - a) / 1e6 for a, b in blocks],
        "busy by stream": {str(s): t / 1e6 for s, t in busy.most_common()},
        "main stream, by what launched it": shown(by_caller),
        "main stream, by kernel": shown(by_kernel, KERNELS),
        "collectives": [
            (e.name()[:50], (e.start_ns() - start) / 1e6, e.duration_ns() / 1e6) for e in work if "nccl" in e.name()
        ],
        "main stream idle": sum(idle.values()) / 1e6,
        "idle, by what the host was in": shown(idle),
        "widest gaps": [(g / 1e6, name, before) for g, name, before in sorted(gaps, reverse=True)[:GAPS]],
    }


def between(events: list[Any], start: int) -> list[tuple[int, int, str]]:
    """(length, middle, next event) of each gap between ordered events, in nanoseconds."""
    gaps, until = [], start
    for e in events:
        if e.start_ns() > until:
            gaps.append((e.start_ns() - until, until + (e.start_ns() - until) // 2, e.name()[:60]))
        until = max(until, end(e))
    return gaps


def end(event: Any) -> int:
    return int(event.start_ns() + event.duration_ns())


def shown(times: Counter[str], most: int | None = None) -> dict[str, float]:
    return {name: t / 1e6 for name, t in times.most_common(most)}


@contextmanager
def places(args: argparse.Namespace, ranks: Any, parser: argparse.ArgumentParser) -> Iterator[tuple[Path, Path]]:
    """(random model, empty folder), the same on all ranks.

    The first rank builds the model where there is none.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model = (args.scratch or Path(temporary)) / f"{args.shape}-{args.layers}"
        if ranks.count > 1 and not args.scratch:
            parser.error("several ranks need --scratch: all of them read the model there")
        if ranks.first and not model.exists():
            random_models.build(model, args.shape, args.layers)
        ranks.all(True)
        work = Path(ranks.broadcast(str(Path(temporary) / "out")))
        work.mkdir(exist_ok=True)
        yield model, work


def arguments(about: str | None) -> argparse.ArgumentParser:
    """Model, calibration text and output directory of the run."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=random_models.SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--scratch", type=Path, help="folder for the model (kept there between calls)")
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    import torch

    random_models.SHAPES[args.shape].import_model()

    with speed.launched_ranks() as ranks, places(args, ranks, parser) as (model, work):
        several = ranks.count > 1
        events, device = profiled(args, model, work, ranks)
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores"
        known = {"date": time.strftime("%Y-%m-%d"), "device": name, "torch": torch.__version__, "ranks": ranks.count}
        result = (
            known | {"arguments": {k: v for k, v in vars(args).items() if k not in ("scratch", "out")}} | look(events)
        )
        text = json.dumps(result, indent=1)
        if ranks.first:
            print(text)
        if args.out:
            args.out.with_name(args.out.name + (f".{ranks.rank}" if several else "")).write_text(text + "\n")
        ranks.all(True)


if __name__ == "__main__":
    main()

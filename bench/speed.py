"""Bench of GPTQ at a big model's shape, ours and gptqmodel: time, peak memory, phases.

Random weights; both in one run.

    python bench/speed.py [--shape llama-3-8b|llama-3-70b|qwen3-30b-a3b|pico|pico-moe] [--layers 4 8] [--samples 128]
        [--length 2048] [--only ours|gptqmodel] [--batch 8] [--sweeps 2] [--correct 0.5] [--profile] [--ranks 1 2]
        [--compiled] [--out FILE]

Each side runs alone in a process of its own, from loading to the written checkpoint, with no kernel compiled before;
--compiled: our kernels are compiled and libraries loaded before, as `requant run` does during the merge.
Weights are bf16 and random, tokens are random: the work does not depend on them (a random router takes all experts
alike; both sides give an expert the tokens that are routed to it). Two depths give a slope, from which a
whole model's time follows (said so).

--ranks runs ours on each of these numbers of GPUs of this host (processes on the CPU), one after another, more than one
through torchrun; the clock starts when the processes have found each other. Strong scaling is the ratio of these times,
of the whole and of a block alone. Time by phase and memory are those of rank 0.
    python bench/speed.py --only ours --layers 8 --ranks 1 2 [--replicated] --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from phases import Phases
from random_models import SHAPES, build

WORKERS = min(12, max(2, ((os.cpu_count() or 1) + 1) // 2))  # gptqmodel's own default, and the two that it needs
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(WORKERS))
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")  # else it compiles C++ while the clock runs


def windows(args: argparse.Namespace) -> Any:
    import torch

    size, generator = (args.samples, args.length), torch.Generator().manual_seed(1)
    return torch.randint(0, SHAPES[args.shape].vocabulary, size, generator=generator)


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Run on every rank; the clock starts when the ranks are connected."""
    with launched_ranks() as ranks:
        return walk_over(args, ranks)


def launched_ranks() -> AbstractContextManager[Any]:
    """The ranks that a launcher started, once joined; without a launcher this process alone."""
    from requant.runtime import launch
    from requant.runtime.ranks import SINGLE_PROCESS

    return launch.join_ranks() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else nullcontext(SINGLE_PROCESS)


def settings_of(args: argparse.Namespace) -> Any:
    from requant.numerics.grid import Grid
    from requant.quantize.plan import Settings

    return Settings(grid=Grid(4, args.group), order="activation", sweeps=args.sweeps, correct=args.correct)


def compile_ahead(args: argparse.Namespace, settings: Any, device: Any, ranks: Any) -> None:
    """Compile kernels and connect ranks, as `requant run` has done when it quantizes."""
    import torch

    from requant.modeling import skeleton
    from requant.modeling.blocks import block_list
    from requant.modeling.fused_ops import FusedOps
    from requant.quantize.warmup import WarmUp

    ranks.connect(device)
    passes = FusedOps(block_list(skeleton.open_model(args.model))[1], device, torch.bfloat16)
    widths = {settings.grid: SHAPES[args.shape].hidden}
    with WarmUp(device, widths, settings, torch.bfloat16, also=[passes.try_out]) as warming:
        warming.wait()
    ranks.broadcast_tensor(torch.zeros(1, device=device))  # after which NCCL has begun


def walk_over(args: argparse.Namespace, ranks: Any) -> dict[str, Any]:
    import torch

    from requant.quantize import memory, solve
    from requant.quantize import stage as quantize

    SHAPES[args.shape].import_model()  # gptqmodel imports it before its clock starts
    device = ranks.device_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    settings = settings_of(args)
    if args.replicated:
        solve.SPLIT_FROM = 10**9
    if args.lean:
        memory.fits_inside_block = lambda *_: False
    phases = Phases()
    phases.watch()
    tokens = windows(args)
    seen: list[tuple[int, float]] = []  # blocks on disk, and when; some may come together
    args.work.mkdir(parents=True, exist_ok=True)
    torch.zeros(1, device=device)  # a process's first touch of a GPU is not what is measured
    if args.compiled:
        compile_ahead(args, settings, device, ranks)
    ranks.all(True)
    started = time.perf_counter()
    prepared: list[float] = []
    walk = quantize._walk

    def walking(*a: Any) -> None:
        prepared.append(time.perf_counter() - started)
        walk(*a)

    quantize._walk = walking
    notes: list[str] = []
    profiler = torch.profiler.profile() if args.profile else None
    if profiler:
        profiler.start()
    quantize.quantize(
        args.model, args.work, tokens, settings, dtype=torch.bfloat16, device=device, batch=args.batch,
        progress=lambda done, *_: seen.append((done, time.perf_counter() - started)), ranks=ranks, notes=notes,
    )  # fmt: skip
    result = finish(started, device)
    if profiler:
        profiler.stop()
        table = profiler.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60)
        print(table)
        result["profile"] = table
    return result | {"phases": phases.seconds(), "notes": notes, "prepared_at": prepared[0], "blocks_done_at": seen}


def gptqmodel(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = windows(args)
    torch.zeros(1, device=device)
    started = time.perf_counter()
    config = QuantizeConfig(bits=4, group_size=args.group, sym=True, desc_act=False, device=device)
    model = GPTQModel.load(str(args.model), config)
    rows = [{"input_ids": w[None], "attention_mask": torch.ones_like(w[None])} for w in tokens]
    model.quantize(rows, batch_size=args.peer_batch)
    model.save(str(args.work))
    return finish(started, torch.device(device))


def finish(started: float, device: Any) -> dict[str, Any]:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    memory = torch.cuda.memory_stats() if device.type == "cuda" else {}
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "peak_device": memory.get("allocated_bytes.all.peak", 0),
        "peak_reserved": memory.get("reserved_bytes.all.peak", 0),
        "alloc_retries": memory.get("num_alloc_retries", 0),
        "peak_rss": rss,
    }


def child(role: str, model: Path, work: Path, argv: list[str], ranks: int) -> dict[str, Any]:
    start = [sys.executable]
    if role == "ours" and ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    command = [*start, __file__, *argv, "--role", role, "--model", str(model), "--work", str(work)]
    with tempfile.TemporaryDirectory() as kernels:  # each compiles its own
        known = os.environ | {"TRITON_CACHE_DIR": kernels}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=known)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        return {"failed": (done.stdout[-1500:] + done.stderr[-2500:])}
    print(done.stdout if "--profile" in argv else "", flush=True)
    return json.loads(lines[-1].removeprefix("RESULT "))  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, nargs="+", default=[4])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--sweeps", type=int, default=2)
    parser.add_argument("--correct", type=float, default=0.5)
    parser.add_argument("--batch", type=int, help="ours: windows at a time, by default as the pipeline chooses")
    parser.add_argument("--peer-batch", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--replicated", action="store_true", help="ours: every rank factors every Hessian by itself")
    parser.add_argument("--only", choices=("ours", "gptqmodel"))
    parser.add_argument(
        "--lean", action="store_true", help="ours: hidden states on the host, no batch waits on the GPU"
    )
    parser.add_argument("--compiled", action="store_true", help="ours: kernels are compiled before the clock starts")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--scratch", type=Path, help="folder for models (kept there between calls)")
    parser.add_argument("--role", choices=("ours", "gptqmodel"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.role:
        result = {"ours": ours, "gptqmodel": gptqmodel}[args.role](args)
        if int(os.environ.get("RANK", "0")) == 0:
            print("RESULT " + json.dumps(result))
        return
    result = compare(args, sys.argv[1:])
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1))
    save(result, args.out)


def save(result: dict[str, Any], out: Path | None) -> None:
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


def compare(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    import torch

    gpus = torch.cuda.device_count()
    device = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else f"{platform.machine()}, {os.cpu_count()} cores"
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "device": device, "torch": torch.__version__, "arguments": argv, "runs": {},
        **({"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if gpus > 1 else {}),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.scratch or Path(temporary)
        for layers in args.layers:
            model = folder / f"{args.shape}-{layers}"
            if not model.exists():
                build(model, args.shape, layers)
            for role, ranks in sides(args):
                work = Path(temporary) / f"{role}-{layers}-{ranks}"
                run = child(role, model, work, argv, ranks) | {"quantized_matrices": quantized_matrices(work)}
                shutil.rmtree(work, ignore_errors=True)
                result["runs"][label(role, layers, ranks)] = run
                save(result, args.out)  # what is there, should the next take too long
                shown = {k: v for k, v in run.items() if k != "profile"}
                print(label(role, layers, ranks), json.dumps(shown, indent=1), flush=True)
    return result | summary(args, result["runs"])


def quantized_matrices(folder: Path) -> int:
    """Matrices with codes in a written checkpoint: both sides must have as many."""
    from safetensors import safe_open

    total = 0
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(name.endswith(".qweight") for name in tensors.keys())  # noqa: SIM118 - not a mapping
    return total


def sides(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Who runs, on how many ranks."""
    every = [("ours", n) for n in args.ranks] + [("gptqmodel", 1)]
    return [side for side in every if args.only in (None, side[0])]


def label(role: str, layers: int, ranks: int = 1) -> str:
    return f"{role}, {layers} layers" + (f", {ranks} ranks" if ranks > 1 else "")


def summary(args: argparse.Namespace, runs: dict[str, Any]) -> dict[str, Any]:
    """Ratios at the largest depth, and the whole model's time from the slope between two depths."""
    out: dict[str, Any] = {}
    for role, ranks in sides(args):
        times = {n: runs[label(role, n, ranks)].get("seconds") for n in args.layers}
        if len(times) > 1 and all(times.values()):
            few, many = min(times), max(times)
            slope = (times[many] - times[few]) / (many - few)
            whole = SHAPES[args.shape].layers
            who = role + (f" on {ranks} ranks" if ranks > 1 else "")
            out[f"{who}: seconds a layer"] = slope
            out[f"{who}: whole model ({whole} layers), extrapolated, seconds"] = times[many] + slope * (whole - many)
    deepest = max(args.layers)
    a, b = (runs.get(label(r, deepest), {}) for r in ("ours", "gptqmodel"))
    if "seconds" in a and "seconds" in b:
        out["times faster"] = b["seconds"] / a["seconds"]
        out["peak device memory ratio (allocated)"] = a["peak_device"] / max(b["peak_device"], 1)
        out["peak device memory ratio (reserved)"] = a["peak_reserved"] / max(b["peak_reserved"], 1)
    for ranks in args.ranks:
        run = runs.get(label("ours", deepest, ranks), {})
        if ranks > 1 and "seconds" in a and "seconds" in run:
            out[f"{ranks} ranks: times faster than one"] = a["seconds"] / run["seconds"]
            one, many = (block_seconds(r["blocks_done_at"]) for r in (a, run))
            if one and many:
                out[f"{ranks} ranks: times faster than one, a block after the first"] = one / many
    return out


def block_seconds(done_at: list[tuple[int, float]]) -> float | None:
    """Mean seconds between blocks reaching the disk, without the first and the last.

    The last waits for no other block.
    """
    if len(done_at) < 3:
        return None
    (first, begun), (last, ended) = done_at[0], done_at[-2]
    return (ended - begun) / (last - first)


if __name__ == "__main__":
    main()

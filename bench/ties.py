"""What another order of sums changes: one rank, two ranks, another batch size.

    python bench/ties.py MERGED [--samples 16] [--length 256] [--out FILE]

MERGED: a small 16-bit model (the demo's runs/.../merged). Calibration text and held-out text are Python's help topics, other
parts of them. Share of weights that differ from the first checkpoint's, by block, and the difference in held-out NLL.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import speed

BATCH, HELD = 4, 32
SIDES = {"one rank": (1, BATCH), "two ranks": (2, BATCH), f"one rank, batches of {BATCH // 2}": (1, BATCH // 2)}


def windows(args: argparse.Namespace) -> Any:
    """int64 [samples + HELD, length]: the last HELD are held out."""
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(args.merged)("\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    return torch.tensor(ids[: (args.samples + HELD) * args.length]).reshape(-1, args.length)


def quantize(args: argparse.Namespace) -> None:
    """One rank's part of one checkpoint."""
    import torch

    from requant import quantize as stage
    from requant.numerics.grid import Grid
    from requant.quantize.plan import Settings

    args.checkpoint.mkdir(exist_ok=True)
    with speed.launched_ranks() as ranks:
        stage.quantize(
            args.merged, args.checkpoint, windows(args)[: args.samples], Settings(grid=Grid(4, 64), sweeps=2, correct=0.5),
            dtype=torch.float16, device=torch.device("cpu"), batch=args.batch, ranks=ranks,
        )  # fmt: skip


def losses(args: argparse.Namespace, checkpoint: Path) -> Any:
    """Mean NLL of each held-out window, fp64."""
    import torch

    from requant.evaluate import variants

    sources = variants.VariantSources.of_checkpoint(checkpoint)
    model = variants.load("gptq", sources, device=torch.device("cpu"), dtype=torch.float32)
    out = []
    with torch.no_grad():
        for ids in windows(args)[args.samples :].split(8):
            log_p = model(ids).logits[:, :-1].log_softmax(-1)
            out.append(-log_p.gather(-1, ids[:, 1:, None])[..., 0].double().mean(1))
    return torch.cat(out)


def differing(one: Path, other: Path) -> dict[str, Any]:
    """Share of quantized weights that differ: of all, by block, by linear of the first block."""
    from requant.formats.registry import load_quantized

    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for (name, a), (_, b) in zip(load_quantized(one), load_quantized(other), strict=True):
        if ".layers." not in name or not name.endswith("_proj.weight"):
            continue
        block = int(name.split(".layers.")[1].split(".")[0])
        for key in ("all", f"block {block:02d}", *([name.split(".")[-2]] if not block else [])):
            counts[key][0] += int((a != b).sum())
            counts[key][1] += a.numel()
    return {key: differ / whole for key, (differ, whole) in sorted(counts.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merged", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.checkpoint:
        return quantize(args)
    import torch

    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__, "samples": args.samples, "length": args.length,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        made = [Path(folder) / str(i) for i in range(len(SIDES))]
        for checkpoint, (ranks, batch) in zip(made, SIDES.values(), strict=True):
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
            own = ["--samples", str(args.samples), "--length", str(args.length), "--batch", str(batch)]
            command = [sys.executable, *launcher, __file__, str(args.merged), *own, "--checkpoint", str(checkpoint)]
            subprocess.run(command, check=True)
        first = losses(args, made[0])
        result["held-out NLL, one rank"] = float(first.mean())
        for name, checkpoint in list(zip(SIDES, made, strict=True))[1:]:
            moved = losses(args, checkpoint) - first
            result[name] = {
                "NLL more": float(moved.mean()), "standard error": float(moved.std() / len(moved) ** 0.5),
                "weights that differ": differing(made[0], checkpoint),
            }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

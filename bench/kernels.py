"""Which kernel reads which checkpoint rightly: every kernel of gptqmodel on this device, every format we write.

    python bench/kernels.py [--device cuda] [--dtype bfloat16 ...] [--backend NAME ...] [--format NAME ...] [--jobs 4]
                            [--with vllm] [--out FILE] [--markdown FILE]

A random Llama (4 layers, hidden 512: whole tiles for every kernel) is quantized here in each format. A cell is the
largest difference of -ln p of any token from our own decoding in fp32: "right" within the rounding of the dtype, else "WRONG";
"refused" with the reason where the kernel does not take the format.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from requant import engines, quantize, variants
from requant.grid import Grid
from requant.layout import Settings

FORMATS = {
    "4 bit g128": Grid(4, 128),
    "4 bit g64": Grid(4, 64),
    "4 bit g32": Grid(4, 32),
    "4 bit row": Grid(4, -1),
    "4 bit g128 signed": Grid(4, 128, signed=True),
    "4 bit g64 signed": Grid(4, 64, signed=True),
    "4 bit row signed": Grid(4, -1, signed=True),
    "4 bit g64 asymmetric": Grid(4, 64, symmetric=False),
    "4 bit row asymmetric": Grid(4, -1, symmetric=False),
    "8 bit g128": Grid(8, 128),
    "8 bit g128 signed": Grid(8, 128, signed=True),
    "8 bit g128 asymmetric": Grid(8, 128, symmetric=False),
    "3 bit g128": Grid(3, 128),
    "2 bit g128": Grid(2, 128),
}
BACKENDS = {
    "cpu": ("auto", "gptq_torch", "gptq_torch_aten", "gptq_torch_int8", "gptq_torch_fused"),
    "cuda": ("auto", "gptq_torch", "gptq_triton", "gptq_marlin", "gptq_machete", "gptq_exllama_v2"),
}
# Of one token's -ln p; a wrong zero point or sign is off by more than 1. The model's logits span about 20.
BOUND = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.4}
LENGTH, ROWS = 64, 4


def make_model(out: Path) -> None:
    """Weights large enough that every token's probability depends on every layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.05, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(out)


@torch.no_grad()
def reference(path: Path, rows: list[list[int]]) -> list[float]:
    """-ln p of every token by our own decoding, fp32."""
    places = variants.Places(path, path, path, path, None, {})
    model = variants.quantized(path, places, torch.device("cpu"), torch.float32)
    logits = model(input_ids=torch.tensor(rows)).logits[:, :-1].float()
    targets = torch.tensor(rows)[:, 1:]
    nll: list[float] = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, reduction="none"
    ).flatten().tolist()  # fmt: skip
    return nll


def cell(
    path: Path, engine: str, backend: str | None, dtype: str, device: str, rows: list[list[int]], ours: list[float]
):  # type: ignore[no-untyped-def]
    """One kernel on one checkpoint."""
    started = time.perf_counter()
    answer = engines.ask(engine, path, rows, dtype=dtype, device=device, backend=backend, threads=1)  # type: ignore[arg-type]
    took = time.perf_counter() - started
    if answer.error is not None:
        return {"state": "refused", "reason": answer.error, "seconds": took}
    theirs = [x for row in answer.nll for x in row]
    worst = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    state = "right" if worst <= BOUND[dtype] else "WRONG"
    return {
        "state": state, "worst": worst, "mean": sum(theirs) / len(theirs) - sum(ours) / len(ours),
        "kernels": list(answer.kernels), "load_seconds": answer.load_seconds, "versions": dict(answer.versions), "seconds": took,
    }  # fmt: skip


def table(cells: dict[str, dict[str, Any]], columns: list[str]) -> str:
    """Markdown: formats down, kernels across."""
    lines = ["| format | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in cells.items():
        texts = [f"{c['state']} ({c['worst']:.1e})" if "worst" in c else c["state"] for c in (row[k] for k in columns)]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", action="append")
    parser.add_argument("--backend", action="append")
    parser.add_argument("--format", action="append", choices=list(FORMATS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--with", dest="with_", action="append", default=[], choices=["vllm"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    kind = args.device.split(":")[0]
    dtypes = args.dtype or (["float32"] if kind == "cpu" else ["float16", "bfloat16"])
    backends = args.backend or list(BACKENDS[kind])
    rows = torch.randint(3, 2048, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        work = Path(folder)
        make_model(work / "model")
        waiting: dict[tuple[str, str], Any] = {}
        for name in args.format or FORMATS:
            out = work / name.replace(" ", "-")
            out.mkdir()
            windows = torch.randint(3, 2048, (8, 128), generator=torch.Generator().manual_seed(2))
            quantize.quantize(
                work / "model",
                out,
                windows,
                Settings(FORMATS[name]),
                dtype=torch.float16,
                device=torch.device("cpu"),
                batch=8,
            )
            ours = reference(out, rows)
            jobs = [("transformers", b, d) for b in backends for d in dtypes]
            jobs += [(e, "vllm", "bfloat16") for e in args.with_]
            for engine, backend, dtype in jobs:
                chosen = None if engine == "vllm" else backend
                job = pool.submit(cell, out, engine, chosen, dtype, args.device, rows, ours)
                waiting[name, f"{backend} {dtype}"] = job
        cells: dict[str, dict[str, Any]] = {}
        for (name, column), job in waiting.items():
            cells.setdefault(name, {})[column] = job.result()
            print(name, "|", column, "|", cells[name][column], flush=True)
    columns = list(next(iter(cells.values())))
    device = (
        str(torch.cuda.get_device_name(args.device))
        if kind == "cuda"
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    result = {"date": time.strftime("%Y-%m-%d"), "device": device, "bound": BOUND, "cells": cells}
    print(table(cells, columns))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(table(cells, columns))


if __name__ == "__main__":
    main()

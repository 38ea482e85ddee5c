"""Which kernel reads which checkpoint correctly: all of gptqmodel's, every format we write.

    python bench/kernel_table.py [--device cuda] [--dtype bfloat16 ...] [--backend NAME ...] [--format NAME ...] [--jobs 4]
                            [--with vllm] [--out FILE]

A random Llama (4 layers, hidden 512: whole tiles for every kernel) is quantized here in each format. A cell is the
largest difference of -ln p of any token from our own decoding in fp32: "right" within the rounding of the dtype, "coarse" within
that of bfloat16 (a 16-bit product where more was asked for), else "WRONG"; "refused" where the kernel does not take the format.
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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from requant import quantize
from requant.deploy import engine_processes
from requant.evaluate import variants
from requant.numerics.grid import Grid
from requant.quantize.plan import Settings

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
    "cpu": ("gptq_torch", "gptq_torch_aten", "gptq_torch_fused", "gptq_torch_int8", "auto"),
    "cuda": ("auto", "gptq_torch", "gptq_triton", "gptq_marlin", "gptq_machete", "gptq_exllama_v2"),
}
# Of one token's -ln p; a wrong zero point or sign is off by more than 1. The model's logits span about 20. In fp32 too most
# kernels form scale * (code - zero) in float16: exact up to 4 bits symmetric, else rounded to 11 bits.
BOUND = {"float32": 0.02, "float16": 0.05, "bfloat16": 0.4}
LENGTH, ROWS = 64, 4
TIMEOUT = 1200


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
    model = variants.quantized(path, device=torch.device("cpu"), dtype=torch.float32)
    logits = model(input_ids=torch.tensor(rows)).logits[:, :-1].float()
    targets = torch.tensor(rows)[:, 1:]
    nll: list[float] = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, reduction="none"
    ).flatten().tolist()  # fmt: skip
    return nll


def cells_of(task: dict[str, Any]) -> None:
    """Run one kernel and dtype on every checkpoint; print one JSON line for each.

    In this process.
    """
    from requant.deploy import engine_transformers as engine

    for name, path in task["paths"].items():
        request = task | {"path": path, "trust_remote_code": False}
        started = time.perf_counter()
        try:
            model = engine.load(request)
            loaded = time.perf_counter() - started
            answer = {
                "nll": engine.score(model, task["rows"]),
                "kernels": engine.kernels(model),
                "load_seconds": loaded,
            }
        except Exception as error:  # noqa: BLE001 - whatever a kernel says is its answer
            answer = {
                "error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:300] if str(error) else ''}"
            }
        print("CELL " + json.dumps({"format": name} | answer), flush=True)


def ask_all(task: dict[str, Any], device: str) -> dict[str, dict[str, Any]]:
    """`cells_of` in a process of its own."""
    settings = {"GPTQMODEL_DISABLE_PACK_EXT": "1", "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--device", device, "--task", json.dumps(task)]
    return ask_process(command, settings, task["paths"], timeout=TIMEOUT)


def ask_process(
    command: list[str], settings: dict[str, str], names: Iterable[str], *, timeout: float
) -> dict[str, dict[str, Any]]:
    """What a process printed as cells, by format; a format it died on, and those after it, say so."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, env=os.environ | settings
        )
        out, end = done.stdout, f"the process ended with {done.returncode}: {done.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired as error:
        out = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
        end = f"no answer in {timeout} s"
    lines = [json.loads(x.removeprefix("CELL ")) for x in out.splitlines() if x.startswith("CELL ")]
    found = {x.pop("format"): x for x in lines}
    return {name: found.get(name, {"error": end}) for name in names}


def by_vllm(paths: dict[str, str], rows: list[list[int]]) -> dict[str, dict[str, Any]]:
    """Every checkpoint in vLLM, one load each."""
    found = {}
    for name, path in paths.items():
        answer = engine_processes.ask("vllm", Path(path), rows, dtype="bfloat16")
        found[name] = (
            {"error": answer.error} if answer.error is not None
            else {"nll": answer.nll, "kernels": list(answer.kernels), "load_seconds": answer.load_seconds}
        )  # fmt: skip
    return found


def judge(raw: dict[str, Any], ours: list[float], dtype: str) -> dict[str, Any]:
    """One cell of the table."""
    if "error" in raw:
        return {"state": "refused", "reason": raw["error"]}
    theirs = [x for row in raw.pop("nll") for x in row]
    worst = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    mean = (sum(theirs) - sum(ours)) / len(ours)
    state = "right" if worst <= BOUND[dtype] else "coarse" if worst <= BOUND["bfloat16"] else "WRONG"  # NaN is WRONG
    return {"state": state, "worst": worst, "mean": mean, **raw}


def table(cells: dict[str, dict[str, Any]], columns: list[str]) -> str:
    """Markdown: formats down, kernels across."""
    lines = ["| format | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in cells.items():
        texts = [f"{c['state']} ({c['worst']:.1e})" if "worst" in c else c["state"] for c in (row[k] for k in columns)]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def checkpoints(work: Path, names: list[str]) -> dict[str, str]:
    """The model in every format, by our own quantizer on random windows."""
    make_model(work / "model")
    windows = torch.randint(3, 2048, (8, 128), generator=torch.Generator().manual_seed(2))
    paths = {}
    for name in names:
        out = work / name.replace(" ", "-")
        out.mkdir()
        settings = Settings(grid=FORMATS[name])
        quantize.quantize(
            work / "model", out, windows, settings, dtype=torch.float16, device=torch.device("cpu"), batch=8
        )
        paths[name] = str(out)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", action="append")
    parser.add_argument("--backend", action="append")
    parser.add_argument("--format", action="append", choices=list(FORMATS))
    parser.add_argument("--jobs", type=int, default=1, help="kernels tried at the same time")
    parser.add_argument("--with", dest="with_", action="append", default=[], choices=["vllm"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        cells_of(json.loads(args.task))
        return
    kind = args.device.split(":")[0]
    rows = torch.randint(3, 2048, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(args.device) if kind == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {n: version(n) for n in ("torch", "transformers", "gptqmodel", "optimum")}, "bound": BOUND,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        paths = checkpoints(Path(folder), args.format or list(FORMATS))
        ours = {name: reference(Path(path), rows) for name, path in paths.items()}
        waiting = {}
        for backend in args.backend or BACKENDS[kind]:
            for dtype in args.dtype or (["float32"] if kind == "cpu" else ["float16", "bfloat16"]):
                task = {"paths": paths, "rows": rows, "backend": backend, "dtype": dtype, "device": args.device}
                waiting[f"{backend} {dtype}"] = (dtype, pool.submit(ask_all, task, args.device))
        if "vllm" in args.with_:
            waiting["vllm bfloat16"] = ("bfloat16", pool.submit(by_vllm, paths, rows))
        cells: dict[str, dict[str, Any]] = {name: {} for name in paths}
        for column, (dtype, job) in waiting.items():
            for name, raw in job.result().items():
                cells[name][column] = judge(raw, ours[name], dtype)
                print(f"{name} | {column} | {cells[name][column]}", flush=True)
            if args.out:
                args.out.write_text(json.dumps(result | {"cells": cells}, indent=1) + "\n")
    print(table(cells, list(waiting)))


if __name__ == "__main__":
    main()

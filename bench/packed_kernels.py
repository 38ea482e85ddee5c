"""Who reads compressed-tensors checkpoints rightly: transformers, Humming's kernels.

    python bench/packed_kernels.py [--device cuda] [--format NAME ...] [--reader NAME ...] [--out FILE]

A random Llama (4 layers, hidden 512) is quantized here in each format and converted. transformers loads it with the package
compressed-tensors: a cell is the largest difference of -ln p of any token from our own decoding in fp32, judged as in
bench/kernel_table.py. Humming (`pip install humming-kernels`), which vLLM 0.33 and SGLang 0.5.23 run for 2 and 3 bits,
multiplies an identity with two linears of the checkpoint, in each layout that it reads: a cell is the largest difference from
our weights, in units of the largest weight; the smallest step of 8 bits is 0.008 of it. What a reader says instead is a refusal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kernel_table
import torch

from requant.deploy.conversion import convert
from requant.formats.registry import open_quantized
from requant.numerics.grid import Grid

FORMATS = {
    "4 bit g128": Grid(4, 128),
    "4 bit g128 signed": Grid(4, 128, signed=True),
    "4 bit g32 signed": Grid(4, 32, signed=True),
    "4 bit row signed": Grid(4, -1, signed=True),
    "4 bit g128 asymmetric": Grid(4, 128, symmetric=False),
    "8 bit g128 signed": Grid(8, 128, signed=True),
    "8 bit g128 asymmetric": Grid(8, 128, symmetric=False),
    "3 bit g128": Grid(3, 128),
    "3 bit g128 signed": Grid(3, 128, signed=True),
    "3 bit g32 asymmetric": Grid(3, 32, symmetric=False),
    "2 bit g64 signed": Grid(2, 64, signed=True),
    "2 bit g64 asymmetric": Grid(2, 64, symmetric=False),
}
LAYOUTS = ("gptq", "compressed-tensors", "auto-round")
READERS = ("transformers float32", "transformers bfloat16", *(f"humming {layout}" for layout in LAYOUTS))
LINEARS = ("model.layers.0.self_attn.k_proj", "model.layers.3.mlp.down_proj")
BOUND = 2.0**-9  # of the largest weight: float16's rounding is at most a fourth of it
TIMEOUT = 150  # seconds a reader


def checkpoints(work: Path, names: list[str]) -> dict[str, dict[str, str]]:
    """Format -> layout -> directory, all of one random model."""
    kernel_table.FORMATS.update({name: FORMATS[name] for name in names})
    made = {name: {"gptq": path} for name, path in kernel_table.checkpoints(work, names).items()}
    for paths in made.values():
        for layout in LAYOUTS[1:]:
            paths[layout] = f"{paths['gptq']}-{layout}"
            convert(Path(paths["gptq"]), Path(paths[layout]), layout)
    return made


def by_transformers(paths: dict[str, str], task: dict[str, Any]) -> dict[str, Any]:
    """-ln p of every token, of the compressed-tensors checkpoint."""
    from requant.deploy import engine_transformers as engine

    model = engine.load(task | {"path": paths["compressed-tensors"], "trust_remote_code": False})
    return {"nll": engine.score(model, task["rows"]), "kernels": engine.kernels(model)}


@torch.no_grad()
def by_humming(path: str) -> dict[str, Any]:
    """The largest difference of its float16 products with an identity from our weights, of two linears."""
    from humming.layer import HummingLayer

    worst, reader = 0.0, open_quantized(Path(path))
    for name in LINEARS:
        layer = HummingLayer.from_safetensors(path, name, torch_dtype=torch.float16).cuda()
        layer.transform()
        ours = reader.read(f"{name}.weight").float().cuda()
        theirs = layer(torch.eye(ours.shape[1], dtype=torch.float16, device="cuda")).T.float()
        worst = max(worst, float((theirs - ours).abs().max() / ours.abs().max()))
        if not torch.isfinite(theirs).all():
            worst = float("inf")
    return {"worst": worst, "state": "right" if worst <= BOUND else "WRONG"}


def cells_of(task: dict[str, Any]) -> None:
    """Ask one reader for every checkpoint, in this process; print one JSON line for each."""
    kind, _, which = task["reader"].partition(" ")
    for name, paths in task["paths"].items():
        try:
            if kind == "humming":
                answer = by_humming(paths[which])
            else:
                answer = by_transformers(paths, task | {"dtype": which, "backend": None})
        except Exception as error:  # noqa: BLE001 - whatever a reader says is its answer
            lines = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {lines[0][:200]} ... {lines[-1][:200]}"}
        print("CELL " + json.dumps({"format": name} | answer), flush=True)


def ask(task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`cells_of` in a process of its own."""
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    return kernel_table.ask_process(command, settings, task["paths"], timeout=TIMEOUT)


def cell(reader: str, raw: dict[str, Any], ours: list[float]) -> dict[str, Any]:
    """What one reader makes of one format."""
    if reader.startswith("humming") and "error" not in raw:
        return raw
    return kernel_table.judge(raw, ours, reader.rpartition(" ")[2])


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for name in ("torch", "transformers", "compressed-tensors", "humming-kernels", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--format", action="append", choices=list(FORMATS))
    parser.add_argument("--reader", action="append", choices=READERS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        cells_of(json.loads(args.task))
        return
    on_gpu = args.device.startswith("cuda")
    readers = args.reader or [r for r in READERS if on_gpu or not r.startswith("humming")]
    rows = torch.randint(3, 2048, (4, 64), generator=torch.Generator().manual_seed(1)).tolist()
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "versions": versions(), "bound": kernel_table.BOUND | {"humming": BOUND},
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        paths = checkpoints(Path(folder), args.format or list(FORMATS))
        ours = {name: kernel_table.reference(Path(found["gptq"]), rows) for name, found in paths.items()}
        cells: dict[str, dict[str, Any]] = {name: {} for name in paths}
        for reader in readers:
            for name, raw in ask({"reader": reader, "paths": paths, "rows": rows, "device": args.device}).items():
                cells[name][reader] = cell(reader, raw, ours[name])
                print(f"{name} | {reader} | {cells[name][reader]}", flush=True)
            if args.out:
                args.out.write_text(json.dumps(result | {"cells": cells}, indent=1) + "\n")
    print(kernel_table.table(cells, readers))


if __name__ == "__main__":
    main()

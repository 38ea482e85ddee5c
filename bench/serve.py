"""Load time and speed of the merged 16-bit checkpoint against the GPTQ one, in one engine.

    python bench/serve.py --merged runs/NAME/merged --gptq runs/NAME/gptq --engine vllm [--device cuda] [--dtype bfloat16]
                          [--layers 32 --work DIR] [--backend gptq_marlin] [--prompt 128] [--new 64] [--batch 1]
                          [--rounds 2] [--out FILE]

Each load is a process of its own; the two take turns, and the best of each counts. The same prompt, greedy, exactly
--new tokens. Ratios are what holds on another machine; absolute CPU numbers do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from requant.deploy import engine_processes


def measure(path: Path, args: argparse.Namespace, backend: str | None) -> dict[str, Any]:
    """One load, one prompt timed --repeat times."""
    answer = engine_processes.ask(
        args.engine, path.absolute(), [list(range(100, 100 + 64))], dtype=args.dtype, device=args.device, backend=backend,
        speed={"prompt": args.prompt, "new": args.new, "batch": args.batch, "repeat": args.repeat}, threads=args.threads,
    )  # fmt: skip
    if answer.error is not None or answer.speed is None:
        raise SystemExit(f"{path}: {answer.error}")
    size = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    return {
        "load_seconds": answer.load_seconds, **answer.speed, "bytes": size, "kernels": list(answer.kernels),
        "versions": dict(answer.versions),
    }  # fmt: skip


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of each number."""
    out = dict(runs[-1])
    for key in ("load_seconds", "prefill_seconds"):
        out[key] = min(r[key] for r in runs)
    out["decode_tokens_per_second"] = max(r["decode_tokens_per_second"] for r in runs)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merged", type=Path)
    parser.add_argument("--gptq", type=Path)
    parser.add_argument(
        "--layers", type=int, help="make both in --work instead: Llama-3-8B's matrices, random, so many layers"
    )
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--engine", choices=engine_processes.ENGINES, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", help="gptqmodel's kernel; default: the one it picks")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    for name, value in (("prompt", 128), ("new", 64), ("batch", 1), ("repeat", 3), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if args.layers:
        args.merged, args.gptq = make(args.work, args.layers, args.device)
    runs: dict[str, list[dict[str, Any]]] = {"merged": [], "gptq": []}
    for turn in range(args.rounds):
        for name, path, backend in (("merged", args.merged, None), ("gptq", args.gptq, args.backend)):
            runs[name].append(measure(path, args, backend))
            shown = {k: round(v, 3) for k, v in runs[name][-1].items() if isinstance(v, float)}
            print(f"{turn + 1} {name}: {shown}", flush=True)
    a, b = best(runs["merged"]), best(runs["gptq"])
    keys = ("load_seconds", "prefill_seconds", "decode_tokens_per_second", "bytes")
    result = {
        "date": time.strftime("%Y-%m-%d"), "engine": args.engine, "device": device_name(args.device), "dtype": args.dtype,
        "prompt": args.prompt, "new": args.new, "batch": args.batch, "rounds": args.rounds, "layers": args.layers,
        "merged": a, "gptq": b, "gptq_over_merged": {k: b[k] / a[k] for k in keys},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def make(folder: Path, layers: int, device: str) -> tuple[Path, Path]:
    """(16-bit, GPTQ W4 g128) checkpoints of Llama-3-8B's matrices with `layers` random layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from requant import quantize
    from requant.numerics.grid import Grid
    from requant.quantize.plan import Settings

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    merged, gptq = folder / "merged", folder / "gptq"
    model.save_pretrained(merged)
    del model
    gptq.mkdir(parents=True)
    windows = torch.randint(3, 32000, (8, 512), generator=torch.Generator().manual_seed(1))
    settings = Settings(grid=Grid(4, 128, search="minmax"))
    quantize.quantize(merged, gptq, windows, settings, dtype=torch.bfloat16, device=torch.device(device))
    return merged, gptq


def device_name(device: str) -> str:
    """The GPU's name, or the processor's kind and cores."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()

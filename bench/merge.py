"""Our merge against transformers + PEFT on one NF4 base; memory against depth.

    python bench/merge.py [--out FILE] [--work DIR]

Builds a random Llama of about 370 M parameters (12 layers), its double-quantized NF4 checkpoint (bitsandbytes through
transformers) and an all-linear LoRA, r = 16, alpha = 32. Each method runs alone in a process of its own, from loading
to the written fp16 checkpoint; seconds exclude interpreter start and imports, memory is the process's peak RSS minus
what it had after the imports.

    ours          streaming dequantize + merge (with its self-test after writing)
    transformers  from_pretrained(NF4) -> dequantize() -> PEFT merge_and_unload -> safetensors
    peft16        from_pretrained(16 bit) -> PEFT merge_and_unload -> save_pretrained: nothing to decode

The depth test merges 12 and 48 layers of a narrower model and compares peaks.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

WIDE = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 12, "num_key_value_heads": 12}
NARROW = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12}
METHODS = ("ours", "transformers", "peft16")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(work: Path, layers: int, shape: dict[str, int]) -> None:
    """base-16bit, base-nf4 and adapter in `work`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16000, num_hidden_layers=layers, tie_word_embeddings=False, dtype="bfloat16", **shape
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(work / "base-16bit")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(work / "base-16bit", quantization_config=four, dtype=torch.bfloat16)
    model.save_pretrained(work / "base-nf4")
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01)
    tuned.save_pretrained(work / "adapter")


def ours(work: Path, out: Path) -> tuple[float, int]:
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from requant import merge
    from requant.adapters import peft_directory
    from requant.merge import selftest
    from requant.run import prepare

    before, started = peak(), time.perf_counter()
    plan, _model = prepare.plan_merge(
        work / "base-nf4", peft_directory.load(work / "adapter"), None, trust_remote_code=False
    )
    merge.merge(plan, out, dtype="float16")
    selftest.self_test(plan, out)
    return time.perf_counter() - started, before


def transformers(work: Path, out: Path) -> tuple[float, int]:
    import torch
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    before, started = peak(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(work / "base-nf4", dtype=torch.bfloat16).dequantize()
    merged = PeftModel.from_pretrained(model, work / "adapter").merge_and_unload(safe_merge=True)
    state = {n: t.to(torch.float16).contiguous() for n, t in merged.state_dict().items()}
    save_file(state, out / "model.safetensors")  # save_pretrained refuses a dequantized bitsandbytes model
    return time.perf_counter() - started, before


def peft16(work: Path, out: Path) -> tuple[float, int]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    before, started = peak(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(work / "base-16bit", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, work / "adapter").merge_and_unload(safe_merge=True).save_pretrained(out)
    return time.perf_counter() - started, before


def child(method: str, work: Path) -> dict[str, Any]:
    """One method in a process of its own."""
    with tempfile.TemporaryDirectory(dir=work) as out:
        command = [sys.executable, __file__, "--method", method, "--work", str(work), "--target", out]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{method} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--target", type=Path)
    parser.add_argument("--build", type=int, help="only build, with so many layers (negative: narrow)")
    args = parser.parse_args()
    if args.build:
        build(args.work, abs(args.build), WIDE if args.build > 0 else NARROW)
        return
    if args.method:
        seconds, before = globals()[args.method](args.work, args.target)
        print("RESULT " + json.dumps({"seconds": seconds, "peak_rss": peak(), "peak_above_imports": peak() - before}))
        return
    result = compare(args.work or Path(tempfile.mkdtemp()), args.repeats)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def compare(root: Path, repeats: int) -> dict[str, Any]:
    """All methods in turn, `repeats` times; the fastest of each counts. Then ours on two depths."""
    cases = {"wide-12": 12, "narrow-12": -12, "narrow-48": -48}
    for name, layers in cases.items():
        (root / name).mkdir(parents=True)
        subprocess.run(
            [sys.executable, __file__, "--build", str(layers), "--work", str(root / name)],
            check=True,
            capture_output=True,
        )
    runs: dict[str, list[dict[str, Any]]] = {m: [] for m in METHODS}
    for _ in range(repeats):
        for method in METHODS:
            runs[method].append(child(method, root / "wide-12"))
    best = {m: min(r, key=lambda x: float(x["seconds"])) for m, r in runs.items()}
    depth = {name: child("ours", root / name) for name in ("narrow-12", "narrow-48")}
    shutil.rmtree(root)
    a, b, c = (best[m] for m in METHODS)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "bitsandbytes")},
        "best": best,
        "time_ratio_to_transformers": a["seconds"] / b["seconds"],
        "memory_ratio_to_transformers": a["peak_rss"] / b["peak_rss"],
        "memory_above_imports_ratio_to_transformers": a["peak_above_imports"] / b["peak_above_imports"],
        "time_ratio_to_peft_on_16_bit": a["seconds"] / c["seconds"],
        "depth": depth,
        "memory_ratio_48_to_12_layers": depth["narrow-48"]["peak_rss"] / depth["narrow-12"]["peak_rss"],
    }


if __name__ == "__main__":
    main()

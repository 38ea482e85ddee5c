"""Bench of streamed scoring, of merging on a GPU, and of `requant check`'s predictions.

Against scoring whole, merging on the CPU, and what a run used.

    python bench/stream.py [--parts whole deep merge predict] [--shape llama-3-8b] [--layers 4] [--deep llama-3-70b]
        [--deep-layers 2 4] [--windows 64] [--length 2048] [--samples 128] [--scratch DIR] [--out FILE]

Random weights in bf16, random tokens: the work does not depend on them.
whole    one model resident and streamed, same windows: time, peak memory, differences in -ln p and KL
deep     a shape that does not fit, streamed at two depths: seconds a layer, from which the whole follows (said so), peak
merge    an NF4 base of the shape (bitsandbytes, nested scales) and a LoRA on every linear: CPU and GPU, and how the files differ
predict  `requant check`'s figures and those of the run that follows, stage by stage
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from random_models import SHAPES, build

from requant.errors import RequantError
from requant.evaluate import streamed, variants
from requant.runtime import measurements

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
RANK, ALPHA = 16, 32
PARTS = ("whole", "deep", "merge", "predict")
RUN = [sys.executable, "-m", "requant", "run"]  # in a process of its own, as a user would


def used(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """(its result, seconds and peaks)."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    with measurements.measured(str(DEVICE)) as cost:
        result = work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    return result, {"seconds": cost.seconds, "peak_host": cost.peak_rss, "peak_device": cost.peak_device}


def evaluation(vocabulary: int, count: int, length: int) -> Any:
    from requant_eval.scoring.windows import Document, make_set

    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(5)).tolist()
    return make_set("random", [Document(tuple(row)) for row in ids], window=length, bos_id=None)


def sources(model: Path) -> variants.VariantSources:
    return variants.VariantSources.of_checkpoint(model)


def scored(model: Path, eval_set: Any, batch: int, *, whole: bool, **reference: Any) -> tuple[Any, dict[str, float]]:
    """Scores and what they took, loading included."""
    from requant_eval.scoring.score_loop import score

    def work() -> Any:
        if whole:
            made: Any = variants.load("merged", sources(model), device=DEVICE, dtype=DTYPE)
        else:
            made = streamed.StreamedModel(streamed.walk_of("merged", sources(model), device=DEVICE, dtype=DTYPE))
            made.run([w.ids for w in eval_set.windows], batch)
        return score(made, eval_set, batch=batch, device=DEVICE, **reference)

    return used(work)


def whole(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Resident and streamed, each after a first time that does not count."""
    vocabulary = SHAPES[args.shape].vocabulary
    model, eval_set = at(folder, args.shape, args.layers), evaluation(vocabulary, args.windows, args.length)
    file = folder / "reference.safetensors"
    short = evaluation(vocabulary, 2, args.length)
    for way in (True, False):
        scored(model, short, args.batch, whole=way)
    resident, a = scored(model, eval_set, args.batch, whole=True, write_reference=file)
    _, b = scored(model, eval_set, args.batch, whole=False, write_reference=folder / "other.safetensors")
    parts, _ = scored(model, eval_set, args.batch, whole=False, reference=file)
    difference = abs(parts.nll - resident.nll)
    return {
        "resident": a, "streamed": b, "time ratio": b["seconds"] / a["seconds"], "tokens": eval_set.n_scored,
        "-ln p: largest difference": float(difference.max()),
        "-ln p: difference of means": float(parts.nll.mean() - resident.nll.mean()),
        "mean KL": float(parts.kl.mean()), "same top-1": float((parts.top1 == resident.top1).mean()),
    }  # fmt: skip


def deep(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    eval_set = evaluation(SHAPES[args.deep].vocabulary, args.windows, args.length)
    for layers in args.deep_layers:
        model = at(folder, args.deep, layers)
        _, out[f"{layers} layers"] = scored(model, eval_set, args.batch, whole=False)
    few, many, all_ = min(args.deep_layers), max(args.deep_layers), SHAPES[args.deep].layers
    if few < many:
        first, last = (out[f"{n} layers"]["seconds"] for n in (few, many))
        slope = (last - first) / (many - few)
        out |= {"seconds a layer": slope, f"{all_} layers, extrapolated, seconds": last + slope * (all_ - many)}
    return out | {"tokens": eval_set.n_scored}


def at(folder: Path, shape: str, layers: int) -> Path:
    model = folder / f"{shape}-{layers}"
    if not model.exists():
        build(model, shape, layers)
    return model


def nf4_base(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """(base in 4 bits, adapter), both as a user's own tools write them."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source, base, adapter = at(folder, args.shape, args.layers), folder / "base", folder / "adapter"
    if base.exists():
        return base, adapter
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    made = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16, device_map={"": DEVICE}
    )
    made.save_pretrained(base)
    linears = [(n, m) for n, m in made.named_modules() if type(m).__name__ == "Linear4bit"]
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in linears:
        for leaf, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
            value = torch.randn(shape, generator=generator) * 0.01
            tensors[f"base_model.model.{name}.lora_{leaf}.weight"] = value
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    targets = sorted({n.rpartition(".")[2] for n, _ in linears})
    config_json = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets,
                   "base_model_name_or_path": "base", "bias": "none", "fan_in_fan_out": False}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config_json))
    tokenizer(base, SHAPES[args.shape].vocabulary)
    return base, adapter


def tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, "t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1").save_pretrained(folder)


def merge(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from requant import merge as merging
    from requant.adapters import peft_directory
    from requant.checkpoint.reader import Checkpoint
    from requant.run import prepare

    base, adapter = nf4_base(args, folder)
    plan, _ = prepare.plan_merge(base, [peft_directory.load(adapter)], None, trust_remote_code=False)
    out: dict[str, Any] = {}
    for name in dict.fromkeys(("cpu", DEVICE.type)):
        target = folder / f"merged-{name}"
        target.mkdir(exist_ok=True)
        device = torch.device(name)
        merging.merge(plan, target, dtype="bfloat16", device=device)  # files are in memory, kernels loaded
        _, out[name] = used(
            lambda target=target, device=device: merging.merge(plan, target, dtype="bfloat16", device=device)
        )
    out["bytes written"] = sum(f.stat().st_size for f in (folder / "merged-cpu").glob("*.safetensors"))
    if DEVICE.type == "cuda":
        one, two = (Checkpoint(folder / f"merged-{n}") for n in ("cpu", "cuda"))
        folded = {op.name for op in plan.ops if op.folds}
        differing = {n: int((one.read(n) != two.read(n)).sum()) for n in one}
        out |= {
            "times faster": out["cpu"]["seconds"] / out["cuda"]["seconds"],
            "values that differ, only decoded": sum(v for n, v in differing.items() if n not in folded),
            "values that differ, folded (bf16)": sum(v for n, v in differing.items() if n in folded),
            "values folded": sum(one[n].nbytes // 2 for n in folded),
        }
    return out


def predict(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from requant import recipe
    from requant.run import evaluation_inputs, prepare
    from requant.run.check.forecast import forecast
    from requant.runtime.device import free_memory, pick_device

    base, adapter = nf4_base(args, folder)
    vocabulary = SHAPES[args.shape].vocabulary
    generator = torch.Generator().manual_seed(9)
    texts = {"train": args.samples * 5 // 4, "heldout": args.windows}
    for name, count in texts.items():
        rows = torch.randint(3, vocabulary, (count, args.length), generator=generator).tolist()
        lines = (json.dumps({"text": " ".join(f"t{i}" for i in row)}) for row in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    document = {
        "name": "bench", "base": {"model": str(base)}, "adapter": str(adapter), "heal": "off",
        "quantize": {"bits": 4, "group_size": args.group},
        "calibration": {"data": {"path": "./train.jsonl"}, "samples": args.samples, "length": args.length},
        "evaluate": {"window": args.length, "stream": args.stream,
                     "sets": [{"name": "heldout", "data": {"path": "./heldout.jsonl"}}]},
        "output": {"dir": str(folder / "runs")},
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(document))
    wanted = recipe.load(file)
    prepared, device = prepare.prepare(wanted), pick_device("auto")
    where = folder / "runs" / "bench"
    started = time.perf_counter()
    needs = forecast(
        prepared,
        evaluation_inputs.variant_sources(prepared, where),
        device,
        evaluation_inputs.dtype(prepared, device),
        evaluation_inputs.batch(prepared, device),
    )
    out: dict[str, Any] = {"forecast took, seconds": time.perf_counter() - started}
    free_memory(device)
    subprocess.run([*RUN, str(file)], check=True)
    cost = json.loads((where / "report.json").read_text())["facts"]["cost"]
    for need in needs:
        measured = {"seconds": need.seconds, "peak_rss": need.host, "peak_device": need.device}
        found = {k: cost[k].get(need.stage) for k in measured if k in cost}
        out[need.stage] = {
            k: {"predicted": v, "used": found.get(k), "ratio": v / found[k] if found.get(k) else None}
            for k, v in measured.items()
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--deep", choices=SHAPES, default="llama-3-70b")
    parser.add_argument("--deep-layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--stream", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--scratch", type=Path, help="folder for models (kept there between calls)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "device": name, "versions": measurements.versions(), "arguments": sys.argv[1:],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.scratch or Path(temporary)
        for part in args.parts:
            try:
                result[part] = {"whole": whole, "deep": deep, "merge": merge, "predict": predict}[part](args, folder)
            except (
                RequantError,
                RuntimeError,
                OSError,
                ValueError,
                subprocess.SubprocessError,
            ) as error:  # recorded; the other parts still run
                traceback.print_exc()
                result[part] = {"failed": f"{type(error).__name__}: {error}"}
            print(json.dumps({part: result[part]}, indent=1), flush=True)
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Bench of `requant convert`: seconds and memory on a Llama-8B-shaped checkpoint.

    python bench/convert.py [--layers 4] [--bits 4 3] [--to compressed-tensors gguf] [--folder DIR] [--out FILE]
    python bench/convert.py --quantize [--layers 4] [--samples 16] [--out FILE]

Codes are random. All sizes but the number of layers (32 are the whole model) are those of Llama 3.1 8B. A checkpoint is
written once for each of --bits, in --folder: 5.7 GB at 4 bits, and as much again for the format. Each conversion is a
process of its own, so that its peak of memory is its own too (`mb_own`: without mapped pages of files, which the system
takes back when it needs room); it takes the threads that it finds, or OMP_NUM_THREADS.
With --quantize a random Llama a quarter as wide is quantized first, by GPTQ on the CPU, and then written in each format
by this process: seconds, and their share of the quantizing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from requant import quantize
from requant.checkpoint.writer import CheckpointWriter, Slot
from requant.deploy.conversion import convert
from requant.deploy.conversion_plan import StoredSettings
from requant.deploy.gguf_export import export
from requant.modeling import skeleton
from requant.numerics.grid import Grid
from requant.quantize import gptq_files
from requant.quantize.plan import Settings, plan

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
NARROW = {
    "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 4,
    "vocab_size": 32064, "tie_word_embeddings": False,
}  # fmt: skip
FORMATS = ("compressed-tensors", "auto-round", "mlx", "gguf")
CHILD = """
import json, os, resource, sys, threading, time
from pathlib import Path
started = time.perf_counter()
import torch
from requant.deploy.conversion import convert
from requant.deploy.gguf_export import export
source, out, to = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
marks = {}
def step(done, total, note):
    marks.setdefault(note.split()[0], time.perf_counter())  # of the first linear that is written, and compared
own = [0]
def watch():
    while True:
        status = open("/proc/self/status").read()
        own[0] = max(own[0], int(status.split("RssAnon:")[1].split()[0]))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
before, start, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
done = export(source, out, progress=step) if to == "gguf" else convert(source, out, to, progress=step)
end = time.perf_counter()
parts = {"imports": start - started, "plan": marks["writing"] - start, "write": marks["comparing"] - marks["writing"],
         "compare": end - marks["comparing"]}
print(json.dumps({"linears": done.linears, "seconds": round(end - start, 1), "cpu": round(time.process_time() - cpu, 1),
                  "parts": {name: round(part, 1) for name, part in parts.items()}, "mb_before": before // 1024,
                  "mb_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "mb_own": own[0] // 1024,
                  "bytes": done.nbytes, "threads": torch.get_num_threads()}))
"""


def write(out: Path, layers: int, bits: int) -> None:
    """A GPTQ checkpoint of random codes, symmetric, in groups of 128."""
    own = {"num_hidden_layers": layers, "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    config = transformers.LlamaConfig(**own, **SHAPE)
    config.save_pretrained(out)
    model = skeleton.build(skeleton.load_config(out))
    tensors = {n: Slot(n, torch.bfloat16, tuple(p.shape)) for n, p in model.named_parameters()}
    settings = StoredSettings(grid=Grid(bits, 128), grids=dict.fromkeys(_linears(model), Grid(bits, 128)))
    planned = plan(tensors, model, settings, torch.bfloat16, where=out)
    middle = torch.tensor([(2 ** (bits - 1) - 1 >> i) & 1 for i in range(bits)] * 32)
    words = (middle.reshape(bits, 32) << torch.arange(32)).sum(1).to(torch.int32)
    with CheckpointWriter(out, planned.slots) as writer:
        for slot in planned.slots:
            writer.write(slot.name, _values(slot, words))
        writer.close()
    gptq_files.write_small_files(out, out, planned, settings, dtype=torch.bfloat16, damp=0.02, meta={})


def _linears(model: Any) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]


def _values(slot: Slot, words: torch.Tensor) -> torch.Tensor:
    """Values of one tensor: random codes, the one zero point of a symmetric file."""
    leaf = slot.name.rpartition(".")[2]
    if leaf == "qweight":
        return torch.randint(-(2**31), 2**31 - 1, slot.shape, dtype=torch.int32)
    if leaf == "qzeros":
        return words.repeat(slot.shape[0], slot.shape[1] // len(words))
    if leaf == "g_idx":
        return (torch.arange(slot.shape[0]) // 128).int()
    return torch.full(slot.shape, 0.01, dtype=slot.dtype)


def tokenizer(out: Path) -> None:
    """A byte-level tokenizer without merges, which GGUF wants to know."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="!").save_pretrained(out)


def since(wall: float, cpu: float) -> tuple[float, float]:
    """Seconds by the clock and of this process's CPU: the second hangs less on what else the machine does."""
    return time.perf_counter() - wall, time.process_time() - cpu


def against_quantize(layers: int, samples: int) -> list[dict[str, Any]]:
    """A row a format: of writing, of quantizing in the same run, and their ratio; by the clock and of the CPU."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=layers, eos_token_id=0, bos_token_id=0, **NARROW)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model, source = Path(folder) / "model", Path(folder) / "gptq"
        transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(model)
        tokenizer(model)
        source.mkdir()
        windows = torch.randint(0, NARROW["vocab_size"], (samples, 512))
        started = (time.perf_counter(), time.process_time())
        settings = Settings(grid=Grid(4, 64))
        quantize.quantize(model, source, windows, settings, dtype=torch.bfloat16, device=torch.device("cpu"), batch=8)
        whole = since(*started)
        for to in FORMATS:
            started, out = (time.perf_counter(), time.process_time()), Path(folder) / to
            done = export(source, out) if to == "gguf" else convert(source, out, to)
            own = since(*started)
            told = {
                kind: [round(part, 2), round(every, 2), round(part / every, 4)]
                for kind, part, every in zip(("seconds", "cpu"), own, whole, strict=True)
            }
            rows.append({"to": to, "layers": layers, "samples": samples, "bytes": done.nbytes[1], **told})
            print(rows[-1], flush=True)
    return rows


def of_a_model(layers: int, bits: int, formats: list[str], folder: Path | None) -> list[dict[str, Any]]:
    """A row a format, of one checkpoint that is written into a directory of its own in `folder`."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as made:
        source, target = Path(made) / "gptq", Path(made) / "out"
        started = time.perf_counter()
        write(source, layers, bits)
        tokenizer(source)
        print(f"{layers} layers of {bits} bits written in {time.perf_counter() - started:.1f} s", flush=True)
        for to in formats:
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(source), str(target), to],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            rows.append({"bits": bits, "layers": layers, "to": to} | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
            shutil.rmtree(target)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--to", nargs="+", default=["compressed-tensors"], choices=FORMATS)
    parser.add_argument("--folder", type=Path, help="directory on the disk to measure; default: of temporary files")
    parser.add_argument("--quantize", action="store_true")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = against_quantize(asked.layers, asked.samples) if asked.quantize else []
    for bits in () if asked.quantize else asked.bits:
        rows += of_a_model(asked.layers, bits, asked.to, asked.folder)
    if asked.out:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "device": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        asked.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

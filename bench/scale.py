"""Files at 70B scale without the bytes: `requant check`, and a merge's memory.

Hundreds of shards.

    python bench/scale.py [--out FILE] [--work DIR]

check: a Llama-3-70B-shaped checkpoint, double-quantized NF4 and 16-bit, of sparse files whose headers are real and whose
tensors are holes (only the quant_state JSONs are written), an all-linear LoRA adapter the same way; the whole command
in a process of its own, from start to exit. merge: a random 16-bit Llama in many shards, all-linear LoRA, merged to
fp16 in shards; peak RSS of the process minus what it had after the imports, beside the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

LLAMA_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SIZES = {"F32": 4, "BF16": 2, "U8": 1}
Entry = tuple[str, tuple[int, ...], bytes | None]


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Name -> [out, in] of every linear in the blocks."""
    h, m = config["hidden_size"], config["intermediate_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    one = {
        "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (m, h), "mlp.up_proj": (m, h), "mlp.down_proj": (h, m),
    }  # fmt: skip
    return {f"model.layers.{i}.{n}": s for i in range(config["num_hidden_layers"]) for n, s in one.items()}


def model_tensors(config: dict[str, Any], packed: bool) -> dict[str, Entry]:
    """name -> (dtype, shape, bytes that are not holes)."""
    h, v = config["hidden_size"], config["vocab_size"]
    found: dict[str, Entry] = {"model.embed_tokens.weight": ("BF16", (v, h), None)}
    for name, (rows, columns) in linears(config).items():
        weight = f"{name}.weight"
        if not packed:
            found[weight] = ("BF16", (rows, columns), None)
            continue
        blocks = rows * columns // 64
        state = {
            "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns], "nested_blocksize": 256,
            "nested_dtype": "float32", "nested_offset": 0.05,
        }  # fmt: skip
        text = json.dumps(state).encode()
        found[weight] = ("U8", (rows * columns // 2, 1), None)
        found[f"{weight}.absmax"] = ("U8", (blocks,), None)
        found[f"{weight}.quant_map"] = ("F32", (16,), None)
        found[f"{weight}.nested_absmax"] = ("F32", (-(-blocks // 256),), None)
        found[f"{weight}.nested_quant_map"] = ("F32", (256,), None)
        found[f"{weight}.quant_state.bitsandbytes__nf4"] = ("U8", (len(text),), text)
    for i in range(config["num_hidden_layers"]):
        found |= {
            f"model.layers.{i}.{n}.weight": ("BF16", (h,), None)
            for n in ("input_layernorm", "post_attention_layernorm")
        }
    return found | {"model.norm.weight": ("BF16", (h,), None), "lm_head.weight": ("BF16", (v, h), None)}


def write_sparse(file: Path, tensors: dict[str, Entry]) -> int:
    """One safetensors file with a real header and holes for data; returns its apparent size."""
    table, offset, filled = {}, 0, []
    for name, (dtype, shape, data) in tensors.items():
        size = SIZES[dtype]
        for n in shape:
            size *= n
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        filled += [(offset, data)] if data else []
        offset += size
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + offset)
        for at, data in filled:
            f.seek(8 + len(text) + at)
            f.write(data)
    return 8 + len(text) + offset


def write_model(path: Path, tensors: dict[str, Entry], shards: int) -> tuple[int, int]:
    """A sharded sparse checkpoint with its index; returns (files, apparent bytes)."""
    path.mkdir(parents=True)
    names = list(tensors)
    step = -(-len(names) // shards)
    groups = [names[i : i + step] for i in range(0, len(names), step)]
    weight_map, total = {}, 0
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        total += write_sparse(path / file, {n: tensors[n] for n in group})
        weight_map |= dict.fromkeys(group, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return len(groups), total


def write_adapter(path: Path, config: dict[str, Any]) -> None:
    path.mkdir()
    tensors: dict[str, Entry] = {}
    for name, (rows, columns) in linears(config).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = ("F32", (16, columns), None)
        tensors[f"base_model.model.{name}.lora_B.weight"] = ("F32", (rows, 16), None)
    write_sparse(path / "adapter_model.safetensors", tensors)
    settings = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 32,
        "target_modules": "all-linear",
        "peft_version": "0.21.2",
    }
    (path / "adapter_config.json").write_text(json.dumps(settings))


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(["text"], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )


RECIPE = """\
name: scale
base: {{model: ./{base}{nf4}}}
adapter: ./adapter
calibration: {{data: {{path: ./train.jsonl}}, samples: 8, length: 256}}
evaluate:
  window: 256
  sets: [{{name: held, data: {{path: ./held.jsonl}}}}]
output: {{dir: {runs}}}
device: cpu
"""


def check(work: Path, base: str, packed: bool, shards: int) -> dict[str, Any]:
    """Seconds of `requant check` on one sparse checkpoint."""
    files, size = write_model(work / base, model_tensors(LLAMA_70B, packed), shards)
    (work / base / "config.json").write_text(json.dumps(LLAMA_70B))
    write_tokenizer(work / base)
    nf4 = "" if packed else ", nf4: {quant_type: nf4, double_quant: true}"
    (work / f"{base}.yaml").write_text(RECIPE.format(base=base, nf4=nf4, runs=work / "runs"))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        command = [sys.executable, "-c", "from requant.cli import main; main()", "check", f"{base}.yaml"]
        done = subprocess.run(command, check=False, cwd=work, capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
        # The disk of a small machine does not hold 70B: the check's last act is to say so.
        if not (done.stdout.endswith("ok\n") or "GB free, the run writes" in done.stderr):
            raise SystemExit(done.stdout + done.stderr)
    return {"shards": files, "apparent_gb": round(size / 1e9, 1), "seconds": [round(s, 2) for s in seconds]}


def merge_memory(work: Path, layers: int, shard: str) -> dict[str, Any]:
    """Peak of a merge in a process of its own, beside the largest tensor."""
    command = [sys.executable, __file__, "--one", str(work), str(layers), shard]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def build(work: Path, layers: int, shard: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=1536, intermediate_size=6144, num_hidden_layers=layers, num_attention_heads=12,
        num_key_value_heads=12, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(work / "base", max_shard_size=shard)
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.01)
    tuned.save_pretrained(work / "adapter")


def one(work: Path, layers: int, shard: str) -> None:
    """Build in a child (its memory is not ours), merge here, print what it took."""
    from requant import merge
    from requant.adapters import peft_directory
    from requant.checkpoint.reader import Checkpoint
    from requant.merge import selftest
    from requant.run import prepare

    code = f"import sys, pathlib; sys.path[:0] = {sys.path!r}; import scale; scale.build(pathlib.Path({str(work)!r}), "
    subprocess.run(
        [sys.executable, "-c", f"{code}{layers}, {shard!r})"],
        check=True, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    plan, _ = prepare.plan_merge(work / "base", peft_directory.load(work / "adapter"), None, trust_remote_code=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (work / "out").mkdir()
    started = time.perf_counter()
    merge.merge(plan, work / "out", dtype="float16", max_shard=100 * 10**6)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    selftest.self_test(plan, work / "out")
    weights = Checkpoint(work / "base")
    largest = max(i.nbytes for i in weights.values())
    print(json.dumps({
        "layers": layers, "shards_in": len(list((work / "base").glob("*.safetensors"))),
        "shards_out": len(list((work / "out").glob("*.safetensors"))),
        "model_mb": round(sum(i.nbytes for i in weights.values()) / 1e6), "largest_tensor_fp32_mb": round(2 * largest / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1), "seconds": round(seconds, 2),
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = Path(args.work or tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    for name, topic in (("train", "one"), ("held", "two")):
        rows = [
            json.dumps({"text": " ".join(f"{topic} {(i * 997 + j) * 7919 % 104729}" for j in range(60))})
            for i in range(60)
        ]
        (work / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    write_adapter(work / "adapter", LLAMA_70B)
    result: dict[str, Any] = {
        "check 70B NF4": check(work, "nf4", True, 300),
        "check 70B 16-bit": check(work, "sixteen", False, 300),
    }
    for layers in (6, 24):
        folder = work / f"merge-{layers}"
        folder.mkdir()
        result[f"merge {layers} layers"] = merge_memory(folder, layers, "100MB")
        shutil.rmtree(folder)
    result["versions"] = {p: version(p) for p in ("torch", "transformers", "peft", "safetensors")} | {
        "python": platform.python_version(), "device": f"cpu, {os.cpu_count()} cores",
    }  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    if not args.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        main()

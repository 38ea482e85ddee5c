"""Mutated models: bases, adapters, checkpoints, their configs, indexes and tokenizers."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from random import Random
from typing import Any

from campaigns import judges
from campaigns.cases import Bench, Case, linked, merge_with, merged, perhaps_strange
from campaigns.mutations import changed_json, to_json
from campaigns.tensor_mutations import changed_tensors, join, split

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
PIPE = "fifo.safetensors"
CONFIG: dict[str, list[Any]] = {  # keys of config.json and values that lie about the tensors, or are none
    "vocab_size": [10**12, 0, -1, 1, 299, 301, 2**63, "300"], "hidden_size": [0, 10**9, 63, -64, 1, 32],
    "num_hidden_layers": [0, 10**6, 10**9, -1, 1, 3, "2"], "num_attention_heads": [0, 3, 10**9, -4, 1, 8],
    "num_key_value_heads": [0, 3, 10**9, 5, 4, 1, None], "intermediate_size": [0, 10**12, 1, 127, 256],
    "head_dim": [0, 10**9, 7, None, 32],
    "max_position_embeddings": [0, 10**15, -1, 1], "rope_theta": [0, -1, 1e400, "x"],
    "architectures": [None, [], ["X"], [3], "X", ["BertModel"]],
    "model_type": ["x", "", None, 3, "gpt2", "mixtral", "../x", "llama4", "bert", "t5", "mamba", "\x1b[2J"],
    "tie_word_embeddings": [True, None, "x", 1], "dtype": ["bfloat17", None, 3, "float64", "int8", "float16"],
    "torch_dtype": ["x", 3],
    "hidden_act": ["x", None, 3, "gelu"], "rms_norm_eps": [None, 0, -1, 1e400, "x"], "pretraining_tp": [4, 0, "x"],
    "quantization_config": [
        None, {}, [], "x", 3, {"quant_method": "gptq"}, {"quant_method": 3}, {"quant_method": []}, {"load_in_8bit": True},
    ],
    "rope_scaling": [{}, {"type": "x"}, "x", [1], {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 0}],
    "rope_parameters": [{}, None, {"rope_type": "x"}, {"rope_type": "linear"}, 3], "attention_bias": [True, "x"],
    "mlp_bias": [True],
    "auto_map": [
        {"AutoConfig": "evil.Evil"}, {"AutoConfig": "other/repo--evil.Evil"}, [], "x", {"AutoModelForCausalLM": "evil.Evil"},
    ],
    "text_config": [{}, {"hidden_size": 3}, "x", []], "num_experts": [8],
    "layer_types": [["x"], [], None, ["full_attention"] * 5],
    "attn_implementation": ["x"], "_attn_implementation": ["flash_attention_2", "x/y", 3],
    "transformers_version": ["99", None, 3],
    "bos_token_id": [10**9, -1, "x", []], "eos_token_id": [10**9, -1, "x", [], [[1]]],
    "pad_token_id": [10**9, 400, -5, "x"],
    "is_encoder_decoder": [True], "sliding_window": [0, -1, "x"], "id2label": [3, {"a": "b"}],
    "num_labels": ["x", -1, 10**8],
    "use_cache": ["x", 3], "torchscript": [True], "return_dict": [False, 3], "chunk_size_feed_forward": ["x"],
}  # fmt: skip
LORA: dict[str, list[Any]] = {  # keys of adapter_config.json
    "r": [0, -1, 10**9, 1.5, "8", None, True, 4, 10**400],
    "lora_alpha": [0, -1, 1e400, "x", None, True, 10**400, float("nan"), [], {}],
    "rank_pattern": [{"": 8}, {"[": 8}, {"(a+)+$": 8}, {".*": "x"}, [], "x", {"q_proj": 4}, {".*": None}],
    "alpha_pattern": [{"[": 8}, {".*": "x"}, [1], "x", {".*": float("nan")}, {".*": 10**400}],
    "peft_type": ["lora", None, 3, [], "ADALORA", {}, "IA3", "VERA", "LOKR", "LOHA", "OFT", "X"],
    "target_modules": [None, "all-linear", [], 3, "[", {"a": 1}, ".*", "(a+)+$", [3]], "use_dora": [True, "x"],
    "use_rslora": [True, "x", 3],
    "bias": ["all", "lora_only", None, 3], "fan_in_fan_out": [True, "x"],
    "modules_to_save": [["lm_head"], "x", 3, [None], ["["]],
    "base_model_name_or_path": [None, 3, [], "", "x" * 10_000, "\x00", "../..", {"a": 1}, "\x1b[2J"],
    "layers_to_transform": [[0], "x", 3, {}, 10**400],
    "init_lora_weights": ["pissa", 3, [], None, False], "target_parameters": [["x"], "x", 3], "revision": [3, [], "x"],
    "trainable_token_indices": [[1], {"x": [1]}, "x", [10**12], [-1]], "task_type": [None, 3, "SEQ_CLS", []],
    "exclude_modules": ["[", ["x"], 3, "(a+)+$"],
    "lora_bias": [True], "ensure_weight_tying": [True, "x"], "layers_pattern": ["[", 3],
    "auto_mapping": [{"base_model_class": "x", "parent_library": "os"}, 3],
    "megatron_config": [{"a": 1}, "x"], "loftq_config": [{"a": 1}], "eva_config": [{"a": 1}],
    "peft_version": [3, "99", None, "\x1b[2J"],
}  # fmt: skip
PLACES = (  # values of an index's weight_map
    "../../x", "../adapter/adapter_model.safetensors", "/etc/passwd", "/dev/zero", "/dev/stdin", "", ".", "..", None,
    1, [], ["a"], {},
    "a" * 5000, "model-00002.safetensors", "config.json", "a\x00b", "\ud800", "/proc/self/mem", True, 1.5, PIPE,
    "\x1b[2J", "~/x",
)  # fmt: skip
GPTQ: dict[str, list[Any]] = {  # keys of quantization_config
    "bits": [5, None, "4", 4.0, True, 2, 3, 8, 0, 10**400],
    "group_size": [0, 33, 10**12, True, -1, 16, 64, "32", None], "sym": [None, True, False, "x"],
    "desc_act": [True, None, "x"], "lm_head": [True, "x"], "checkpoint_format": [[], "gptq_v2", "marlin", None],
    "quant_method": [[], "awq", None, 3],
    "dynamic": [
        {"[": {}}, {"+:.*": {"bits": "x"}}, {"+:.*": 3}, [], "x", {"-:.*": {}}, {"(a+)+$": {}}, {"+:.*": {"group_size": 0}},
        {"+:.*": {"bits": 8}},
    ],
    "modules_in_block_to_quantize": [3, [[3]], ["x"], [["self_attn.q_proj"]]], "meta": [3, [], {"a": "\x1b[2J"}],
}  # fmt: skip


def stated(document: dict[str, Any], table: dict[str, list[Any]], rng: Random) -> tuple[bytes, str]:
    """A JSON object with one or two keys of the table set, or changed at random."""
    if rng.random() < 0.45:
        return changed_json(document, rng, depth=3)
    made, told = copy.deepcopy(document), []
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(tuple(table))
        made[key] = rng.choice(table[key])
        told.append(f"{key}={str(made[key])[:40]}")
    return to_json(made), "; ".join(told)


def judge_merged(bench: Bench, folder: Path) -> str:
    """After a merge: does the format's library read what was read, and transformers what was written?"""
    refused = judges.library_refusal(folder)
    if refused or not merged(bench).exists():  # check writes nothing
        return refused
    written = judges.library_refusal(merged(bench)) or judges.not_finite(merged(bench))
    return written or judges.outside(bench.shop, "load_model", merged(bench))


def _merge(bench: Bench, key: str, name: str, data: bytes, label: str) -> Case:
    """A merge with one file of the base (`base.model`) or the adapter (`adapter`) replaced."""
    part = key.split("__", maxsplit=1)[0]
    folder = linked(bench.shop.project / part, bench.folder / part, {name: data})
    told = perhaps_strange(bench, folder / name, label)
    argv = merge_with(bench, **{key: folder})
    return Case(argv=argv, label=told, judge=lambda: judge_merged(bench, folder))


def base_tensors(bench: Bench) -> Case:
    data, label = changed_tensors((bench.shop.project / "base" / WEIGHTS).read_bytes(), bench.rng)
    return _merge(bench, "base__model", WEIGHTS, data, label)


def adapter_tensors(bench: Bench) -> Case:
    data, label = changed_tensors((bench.shop.project / "adapter" / ADAPTER).read_bytes(), bench.rng)
    return _merge(bench, "adapter", ADAPTER, data, label)


def base_config(bench: Bench) -> Case:
    config = json.loads((bench.shop.project / "base" / "config.json").read_text())
    data, label = stated(config, CONFIG, bench.rng)
    return _merge(bench, "base__model", "config.json", data, label)


def adapter_config(bench: Bench) -> Case:
    config = json.loads((bench.shop.project / "adapter" / "adapter_config.json").read_text())
    data, label = stated(config, LORA, bench.rng)
    return _merge(bench, "adapter", "adapter_config.json", data, label)


def init(bench: Bench) -> Case:
    """`requant init ADAPTER`, whose recipe quotes the adapter's config."""
    config = json.loads((bench.shop.project / "adapter" / "adapter_config.json").read_text())
    data, label = stated(config, LORA, bench.rng)
    folder = linked(bench.shop.project / "adapter", bench.folder / "adapter", {"adapter_config.json": data})
    return Case(argv=["init", folder], label=perhaps_strange(bench, folder / "adapter_config.json", label))


def quant_state(bench: Bench) -> Case:
    """The JSON that bitsandbytes packs into a tensor beside every 4-bit weight."""
    header, body = split((bench.shop.project / "base" / WEIGHTS).read_bytes())
    name = bench.rng.choice(sorted(n for n in header if "quant_state" in n))
    first, last = header[name]["data_offsets"]
    state, label = changed_json(json.loads(body[first:last]), bench.rng, depth=2)
    grown = len(state) - (last - first)
    for entry in (e for n, e in header.items() if n != "__metadata__"):
        entry["data_offsets"] = [n + grown if n >= last else n for n in entry["data_offsets"]]
    header[name] |= {"shape": [len(state)], "data_offsets": [first, first + len(state)]}
    return _merge(bench, "base__model", WEIGHTS, join(header, body[:first] + state + body[last:]), f"{name} {label}")


def base_index(bench: Bench) -> Case:
    """model.safetensors.index.json: files that lie elsewhere, are none, or lack what they should hold."""
    rng, names = bench.rng, split((bench.shop.project / "base" / WEIGHTS).read_bytes())[0]
    index: dict[str, Any] = {
        "metadata": {"total_size": 1},
        "weight_map": {n: WEIGHTS for n in names if n != "__metadata__"},
    }
    name, kind = rng.choice(sorted(index["weight_map"])), rng.random()
    label = f"{name} is elsewhere"
    if kind < 0.5:
        place = rng.choice(PLACES)
        every = rng.random() < 0.3
        index["weight_map"] = {n: place if every or n == name else WEIGHTS for n in index["weight_map"]}
        label = f"{name} in {str(place)[:30]!r}"
    elif kind < 0.6:
        del index["weight_map"][name]
    elif kind < 0.7:
        index["weight_map"]["extra.weight"] = WEIGHTS
    data, more = changed_json(index, rng, depth=2) if kind >= 0.7 else (to_json(index), label)
    case = _merge(bench, "base__model", "model.safetensors.index.json", data, more)
    if PIPE.encode() in data:
        os.mkfifo(bench.folder / "base" / PIPE)
    return case


def base_tokenizer(bench: Bench) -> Case:
    """tokenizer.json, tokenizer_config.json, generation_config.json of the base."""
    name = bench.rng.choice(("tokenizer.json", "tokenizer_config.json", "generation_config.json"))
    document = json.loads((bench.shop.project / "base" / name).read_text())
    data, label = (
        stated(document, TOKENIZER, bench.rng) if name == "tokenizer_config.json" else changed_json(document, bench.rng)
    )
    return _merge(bench, "base__model", name, data, label)


TOKENIZER: dict[str, list[Any]] = {
    "tokenizer_class": ["Evil", None, 3, "BertTokenizer", "LlamaTokenizer", "\x1b[2J"],
    "auto_map": [{"AutoTokenizer": ["evil.Evil", None]}, 3],
    "bos_token": [3, {"a": 1}, "zzz", None, "\x1b[2J"], "eos_token": [None, 3, "zzz"],
    "model_max_length": ["x", -1, 0, 1e400], "backend": ["x", 3],
    "added_tokens_decoder": [{"x": 3}, {"0": {"content": "a"}}, {"999999": {"content": "zz"}}, {"0": 3}, []],
    "extra_special_tokens": [3, ["a"] * 10],
    "processor_class": ["x", 3], "add_bos_token": [True, "x"], "special_tokens_map_file": ["/etc/passwd"],
    "tokenizer_file": ["/etc/passwd", 3],
    "padding_side": ["x", 3],
    "chat_template": [3, [], {"a": 1}, "{{ x", [{"name": "default", "template": "{{ messages }}"}]],
}  # fmt: skip


def _checkpoint(bench: Bench, *, foreign: bool) -> tuple[Path, str]:
    """The finished run's checkpoint with one file changed. foreign: without the manifest, as from another tool."""
    source, rng = bench.shop.finished / "gptq", bench.rng
    name = rng.choice(
        (
            WEIGHTS,
            WEIGHTS,
            "config.json",
            "config.json",
            "quantize_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    )
    if name == WEIGHTS:
        data, label = changed_tensors((source / name).read_bytes(), rng)
    else:
        document = json.loads((source / name).read_text())
        data, label = _changed_config(document, name, rng)
    files: dict[str, bytes | None] = {name: data}
    if foreign:
        files["manifest.json"] = None
    folder = linked(source, bench.folder / "gptq", files)
    return folder, perhaps_strange(bench, folder / name, label)


def _changed_config(document: dict[str, Any], name: str, rng: Random) -> tuple[bytes, str]:
    if name == "config.json" and rng.random() < 0.5:
        inner, label = stated(document["quantization_config"], GPTQ, rng)
        text = json.dumps(document | {"quantization_config": "HERE"}).encode()
        return text.replace(b'"HERE"', inner), f"quantization_config.{label}"
    tables = {"config.json": CONFIG, "quantize_config.json": GPTQ, "tokenizer_config.json": TOKENIZER}
    return stated(document, tables[name], rng) if name in tables else changed_json(document, rng)


def _judge_checkpoint(bench: Bench, folder: Path, *, exact: bool) -> str:
    """After `ok`: does the library read the file, transformers the configs; exact: are the weights those written?"""
    return (
        judges.library_refusal(folder)
        or (judges.values_differ(folder / WEIGHTS, bench.shop.finished / "gptq" / WEIGHTS) if exact else "")
        or judges.outside(bench.shop, "load_configs", folder)
    )


def foreign_checkpoint(bench: Bench) -> tuple[Path, str]:
    """The finished run's checkpoint, as from another tool, with one file changed."""
    return _checkpoint(bench, foreign=True)


def verify(bench: Bench) -> Case:
    """`requant verify` of a run's checkpoint that was changed afterwards; its manifest is there."""
    folder, label = _checkpoint(bench, foreign=False)
    return Case(argv=["verify", folder], label=label, judge=lambda: _judge_checkpoint(bench, folder, exact=True))


def verify_foreign(bench: Bench) -> Case:
    """`requant verify` of a checkpoint without a manifest, now and then against its source."""
    folder, label = foreign_checkpoint(bench)
    argv: list[object] = [
        "verify",
        folder,
        *(("--against", bench.shop.finished / "merged") if bench.rng.random() < 0.4 else ()),
    ]
    return Case(argv=argv, label=label, judge=lambda: _judge_checkpoint(bench, folder, exact=False))


def heal_foreign(bench: Bench) -> Case:
    """`requant heal --checkpoint` of a checkpoint without a manifest."""
    folder, label = foreign_checkpoint(bench)
    shop, out = bench.shop, bench.folder / "out"
    argv: list[object] = [
        "heal", "--checkpoint", folder, "--teacher", shop.finished / "merged", "--data", shop.project / "train.jsonl",
        "--steps", "2", "--batch", "1", "--length", "16", "--device", "cpu", "--out", out,
    ]  # fmt: skip
    return Case(argv=argv, label=label, judge=lambda: judges.library_refusal(folder) or judges.library_refusal(out))


def push(bench: Bench) -> Case:
    """`requant push`, without --yes: what it would send, and where to."""
    folder, label = _checkpoint(bench, foreign=bench.rng.random() < 0.5)
    name = bench.rng.choice(
        ("a/b", "a/b", "a/b", "x", "../x", "a/" + "b" * 200, "a/b\n", "\x1b/x", "", "a/b/c", "\udc80/x")
    )
    return Case(
        argv=["push", folder, name], label=f"{label} to {name[:20]!r}", judge=lambda: judges.library_refusal(folder)
    )


MAKERS = (
    (base_tensors, 12), (adapter_tensors, 10), (base_config, 12), (adapter_config, 9), (init, 3), (quant_state, 6),
    (base_index, 6),
    (base_tokenizer, 8), (verify, 8), (verify_foreign, 8), (heal_foreign, 4), (push, 3),
)  # fmt: skip

"""Examples of every section: in the JSON Schema for editors, and in docs/recipe.md.

A section's examples are whole, and together have every key of it.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict


def _shown(*examples: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": list(examples)})


SOURCE = _shown({"path": "meta-llama/Llama-3.1-8B-Instruct", "revision": "main"})

ADAPTER_SOURCE = _shown({"path": "./my-adapter"}, {"path": "ann/adapter", "revision": "v2", "expert_order": "peft"})

WEIGHTED_ADAPTER = _shown(
    {"path": "./style", "weight": 1.0},
    {"path": "ann/facts", "revision": "main", "expert_order": "auto", "weight": 0.5},
)

NF4 = _shown(
    {"quant_type": "nf4", "double_quant": True, "load_dtype": "bfloat16"},
    {
        "quant_type": "nf4",
        "double_quant": False,
        "blocksize": 64,
        "load_dtype": "bfloat16",
        "compute_dtype": "float16",
        "skip": ["lm_head", "vision_tower"],
        "transformers": 4,
    },
)

BASE = _shown(
    {"model": "meta-llama/Llama-3.1-8B-Instruct", "nf4": {"quant_type": "nf4", "double_quant": True}},
    {"model": "unsloth/Qwen3-8B-unsloth-bnb-4bit", "revision": "main", "nf4": "auto", "original": "Qwen/Qwen3-8B"},
    {"model": "mistralai/Mistral-7B-v0.3", "nf4": "none"},
)

MERGE = _shown({"onto": "dequantized", "dtype": "auto", "max_shard": "2GB"})

OVERRIDE = _shown({"bits": 8, "group_size": 64, "symmetric": True}, {"skip": True})

QUANTIZE = _shown(
    {"budget": 3.5, "group_size": 128, "overrides": {"*.layers.0.*": {"skip": True}}},
    {"bits": 4, "group_size": 128, "overrides": {"*.down_proj": {"bits": 8}, "*.layers.0.*": {"skip": True}}},
    {
        "bits": 4,
        "group_size": 64,
        "symmetric": True,
        "signed_scales": False,
        "engine": "requant",
        "scale_search": "hessian",
        "order": "auto",
        "sweeps": 2,
        "correct": 0.5,
        "damp": 0.05,
        "dtype": "bfloat16",
        "experts": "auto",
        "embeddings": 8,
        "head": 8,
    },
)

OUTPUT = _shown({"dir": "runs", "keep": ["gptq"], "formats": ["gptq", "compressed-tensors"], "track": ["tensorboard"]})

DATA = _shown(
    {"path": "./train.jsonl", "column": "body", "documents": 2000, "ignore": ["notes"]},
    {"dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test", "revision": "main"},
    {"builtin": "python-reference"},
)

MIX_ENTRY = _shown({"data": {"path": "./train.jsonl"}, "format": "chat", "share": 2.0})

CALIBRATION = _shown(
    {
        "mix": [
            {"data": {"path": "./train.jsonl"}},
            {"data": {"dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"}, "format": "text"},
        ],
        "samples": 128,
        "length": 2048,
        "seed": 0,
    },
    {"data": {"path": "./train.jsonl"}, "format": "chat"},
)

CANARIES = _shown({"path": "./canaries.jsonl", "format": "chat"})

EVAL_SET = _shown(
    {"name": "in-domain", "data": {"path": "./heldout.jsonl"}, "format": "chat", "score": "completion"},
    {
        "name": "general",
        "data": {"dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test"},
        "format": "text",
        "tokens": 100000,
        "document_tokens": 2048,
    },
)

EVALUATE = _shown(
    {
        "sets": [{"name": "in-domain", "data": {"path": "./heldout.jsonl"}, "score": "completion"}],
        "variants": ["base", "adapter", "merged", "rtn", "gptq"],
        "protocol": "documents",
        "window": 2048,
        "kl": True,
        "batch": 4,
        "stream": "auto",
        "dtype": "auto",
        "tasks": ["gsm8k", {"path": "./tasks/words.yaml", "limit": 200}],
        "task_variants": ["adapter", "merged", "gptq"],
        "task_backend": "transformers",
        "answers": {"prompts": 20, "new_tokens": 256},
        "roads": ["rtn", "nf4-merge", "nf4-again"],
        "in_domain": "in-domain",
    }
)

ANSWERS = _shown({"prompts": 20, "new_tokens": 256}, {"prompts": 6, "begin": 32}, {"prompts": 0})

TASK = _shown(
    {"name": "gsm8k", "limit": 500, "few_shot": 5, "chat": True, "metric": "exact_match,flexible-extract"},
    {"path": "./tasks/words.yaml", "name": "words"},
)

HEAL = _shown(
    {"steps": 300, "batch": 16, "length": 512, "lr": 0.005, "code_lr": 0.001, "tune": ["scales", "codes"]},
    {"target": "adapter", "mode": "whole", "data": {"path": "./more.jsonl"}, "format": "chat", "seed": 1},
    {"tune": ["scales", "norms"], "mix": [{"data": {"path": "./a.jsonl"}}, {"data": {"path": "./b.txt"}}]},
)

GATE = _shown(
    {"metric": "ppl_increase", "set": "in-domain", "max": "5%"},
    {"metric": "retention", "set": "in-domain", "min": "90%"},
    {"metric": "ppl_increase", "set": "general", "max": "50%", "relative_to": "rtn"},
    {"metric": "task", "task": "gsm8k", "max_drop": "2 points"},
)

_SMALLEST: dict[str, Any] = {
    "name": "my-adapter-w4g128",
    "base": {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "nf4": {"quant_type": "nf4", "double_quant": True, "load_dtype": "bfloat16"},
    },
    "adapter": "./my-adapter",
    "calibration": {"data": {"path": "./train.jsonl"}},
    "evaluate": {"sets": [{"name": "in-domain", "data": {"path": "./heldout.jsonl"}}]},
    "gates": [{"metric": "ppl_increase", "set": "in-domain", "max": "5%"}],
}

_EVERY_KEY: dict[str, Any] = {
    "version": 1,
    **{key: value for key, value in _SMALLEST.items() if key != "adapter"},
    "adapters": [{"path": "./style", "weight": 1.0}, {"path": "./facts", "weight": 0.5}],
    "merge": {"dtype": "auto"},
    "quantize": {"bits": 4, "group_size": 64},
    "chat_date": "2026-01-31",
    "heal": "off",
    "canaries": "./canaries.jsonl",
    "output": {"keep": ["gptq"]},
    "deploy": ["vllm"],
    "device": "cuda:0",
    "trust_remote_code": False,
}

RECIPE = _shown(_SMALLEST, _EVERY_KEY)

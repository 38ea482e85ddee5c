"""Model types that a real vLLM serves from checkpoints of ours; classes that servers have.

`tests/deploy/test_vllm_families.py` runs the list, docs/families.md shows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from helpers import pico, tiny
from helpers.e2e import make_tokenizer
from requant.deploy.engine_classes import SGLANG, VLLM, Registry

WORDS = 320  # of the models: more than the tokenizer has
# Sizes that vLLM's kernels for CPUs take, where a type has the setting.
_SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "vocab_size": WORDS, "moe_intermediate_size": 128, "mamba_d_ssm": 512,
    "shared_expert_intermediate_size": 128, "shared_intermediate_size": 128, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}  # fmt: skip
_PLACES = (
    "image_token_index", "boi_token_index", "eoi_token_index", "image_token_id", "video_token_id",
    "vision_start_token_id", "vision_end_token_id",
)  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_expand": 2}
_MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [8, 12, 12]}


@dataclass(frozen=True, kw_only=True)
class Served:
    """One model type. experts: how they are served, where it has some. changes: of its tiny config."""

    kind: str
    experts: Literal["", "quantized", "in 16 bit"] = ""
    changes: Mapping[str, Any] = field(default_factory=dict)


SERVED = (
    Served(kind="gemma3"),
    Served(kind="gemma3n_text"),
    Served(kind="mistral3"),
    Served(kind="qwen2_5_vl", changes={"text_config.rope_parameters": _MROPE}),
    Served(kind="qwen3_vl"),
    Served(kind="qwen3_5"),
    Served(kind="glm4"),
    Served(kind="phi3"),
    Served(kind="olmo2"),
    Served(kind="falcon_h1", changes=_MAMBA),
    Served(kind="granitemoehybrid", experts="quantized", changes=_MAMBA | {"num_local_experts": 4}),
    Served(kind="granitemoe", experts="quantized"),
    Served(kind="mixtral", experts="quantized"),
    Served(kind="qwen3_moe", experts="quantized"),
    Served(kind="qwen3_next", experts="quantized"),
    Served(kind="qwen3_5_moe", experts="quantized"),
    Served(kind="qwen3_vl_moe", experts="quantized"),
    Served(kind="lfm2_moe", experts="in 16 bit"),
    Served(kind="gpt_oss", experts="in 16 bit"),
)

# Read whole by vLLM's loaders where its kernels for CPUs refuse them, or with the towers that text does not need.
FILLED = (
    Served(kind="mistral3"),
    Served(kind="qwen3_5"),
    Served(kind="lfm2_moe", experts="quantized"),
    Served(
        kind="gemma4_text",
        experts="quantized",
        changes={
            "per_layer_config": {2: {"head_dim": 64}},
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
        }
        | {"moe_intermediate_size": 128},
    ),
    Served(kind="gpt_oss", experts="quantized"),
)


def build(served: Served, folder: Path) -> Path:
    """A random model of the type in bfloat16, with a tokenizer."""
    default = tiny.config(served.kind).to_dict()
    text = default.get("text_config")
    inside, prefix = (text, "text_config.") if isinstance(text, dict) else (default, "")
    changes = {f"{prefix}{name}": size for name, size in _SIZES.items() if name in inside}
    changes |= {name: WORDS - 1 for name in _PLACES if name in default}
    saved = pico.save(tiny.model(served.kind, **(changes | dict(served.changes))), folder, torch.bfloat16)
    if served.kind == "qwen3_vl_moe":  # a setting that hub configs have and transformers 5.23 does not write
        file = saved / "config.json"
        config = json.loads(file.read_text())
        config["text_config"]["norm_topk_prob"] = True
        file.write_text(json.dumps(config))
    make_tokenizer(saved)
    return saved


_SECTION = """
## In servers

Loaded and scored by vLLM 0.32 on a CPU, from checkpoints of ours of random models: mean -ln p of the same tokens is that of
our decoder within the rounding of bfloat16 (`tests/deploy/test_vllm_families.py`; experts quantized need a CPU with AMX).
Wrappers are asked with text alone.

{served}

Read whole by vLLM's own loaders, every parameter filled, where its kernels for CPUs refuse the model: `lfm2_moe` and `gemma4_text`
with quantized experts; with their towers: `mistral3`, `qwen3_5`.

`requant check` says for each server whether it has the model's class (`pipeline/requant/deploy/engine_classes.py`, read
{read}). Read again for the types that became exact last: Qwen 4 has classes of its own in vLLM, and with its tower in
SGLang; both build the connections between layers in 16 bit, and vLLM makes one matrix of q, k, v and the index. Gemma 3n has
classes of its own in both, altup in 16 bit; Granite 4 Vision in vLLM, and in SGLang transformers' code. DeepSeek OCR 2 is
known to vLLM by the name of its remote code, `DeepseekOCR2ForCausalLM`; by transformers' name both run transformers' code, as
they do HunYuan VL. Molmo 2 has a class of its own in vLLM, which reads config.json by the checkpoint's code (`vit_config`,
with `--trust-remote-code`).

Of the {count} classes above that are exact or have experts in 16 bit:

{registries}
"""


def section(classes: Iterable[str]) -> str:
    """The part of docs/families.md about servers. classes: of the model types that requant quantizes."""
    every = sorted(set(classes))
    rows = ["| model type | experts |", "|---|---|"]
    rows += [f"| `{s.kind}` | {s.experts or '-'} |" for s in SERVED]
    registries = "\n\n".join(_registry(registry, every) for registry in (VLLM, SGLANG))
    (read,) = {r.source[-10:] for r in (VLLM, SGLANG)}  # a date
    return _SECTION.format(served="\n".join(rows), count=len(every), registries=registries, read=read)


def _registry(registry: Registry, classes: list[str]) -> str:
    """What one engine has of these classes."""
    own = [c for c in classes if c in registry.own]
    generic = [c for c in classes if c in registry.generic]
    others = [c for c in classes if c not in registry.own and c not in registry.generic]
    refused = [f"{c} ({why})" for c, why in registry.refuses.items() if c in classes]
    refused += [f"{c} with quantized experts ({why})" for c, why in registry.refuses_experts.items() if c in classes]
    refused += [f"{c} in GPTQ ({why})" for c, why in registry.refuses_gptq.items() if c in classes]
    lines = [
        f"**{registry.name}** has {len(own)} of them" + (f"; it refuses {'; '.join(refused)}" if refused else "") + "."
    ]
    if generic:
        lines.append(f"By transformers' code, as its registry says: {', '.join(generic)}.")
    lines.append(
        f"Not in its registry, run by transformers' code where that is able to (`check` asks the class): {', '.join(others)}."
    )
    return " ".join(lines)

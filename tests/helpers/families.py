"""Table of the model families proven end to end; the tests run it, the docs list it.

What the code must know of a family beyond its structure is in `requant.modeling.families`.

`PYTHONPATH=pipeline:eval:tests python -m helpers.families` writes docs/families.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import served
from helpers.sweep import RESULTS, Outcome


@dataclass(frozen=True)
class Family:
    """One architecture.

    kind: transformers' model_type. left: names in a block that stay in 16 bit by design.
    """

    name: str
    kind: str
    note: str = ""
    loads: tuple[str, ...] = ("transformers", "gptqmodel")  # what of these reads its GPTQ checkpoint
    changes: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    left: tuple[str, ...] = ()


_ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}

FAMILIES = (
    Family("Llama 2, 3", "llama"),
    Family("Mistral", "mistral", changes={"sliding_window": 8}),
    Family("Qwen 2, 2.5", "qwen2", "biases on q, k, v"),
    Family("Qwen 3", "qwen3", "norms on q and k"),
    Family("Gemma", "gemma", "tied head"),
    Family("Gemma 2", "gemma2", "alternating window, soft caps"),
    Family("Gemma 3 (text)", "gemma3_text", "two rotary bases, sliding window"),
    Family("Phi-2", "phi", "attention and MLP in parallel, one input"),
    Family("Phi-3, 3.5, 4", "phi3", "qkv and gate_up fused in the checkpoint", loads=("transformers",)),
    Family("GPT-2", "gpt2", "Conv1D, stored [in, out]", loads=("gptqmodel",), lora={"fan_in_fan_out": True}),
    Family("OPT", "opt", "biases, learned positions"),
    Family("GPT-NeoX, Pythia", "gpt_neox", "fused query_key_value, parallel blocks", loads=("transformers",)),
    Family("StableLM", "stablelm"),
    Family("Falcon", "falcon", "one shared key and value; bitsandbytes leaves its linears in 16 bit", loads=("gptqmodel",)),
    Family("Cohere Command R", "cohere", "parallel blocks, tied head"),
    Family("Cohere 2", "cohere2", "window and full attention in turns"),
    Family("OLMo 2", "olmo2", "norms after the sublayers"),
    Family("Granite 3", "granite", "multipliers"),
    Family("SmolLM3", "smollm3", "layers without positions"),
    Family("StarCoder 2", "starcoder2", "biases everywhere"),
    Family("GLM-4 (0414)", "glm4", "gate_up fused in the checkpoint", loads=("transformers",)),
    Family("Mixtral", "mixtral", "experts split", loads=(), lora=_ATTENTION),
    Family("Qwen 3 MoE", "qwen3_moe", "experts split", loads=("gptqmodel",), lora=_ATTENTION),
    Family("Qwen 2 MoE", "qwen2_moe", "experts split; a shared expert",
           loads=("gptqmodel",), lora=_ATTENTION, left=("mlp.shared_expert_gate",)),
    Family("OLMoE", "olmoe", "experts split", loads=("gptqmodel",), lora=_ATTENTION),
)  # fmt: skip
BY_KIND = {family.kind: family for family in FAMILIES}

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
_HEAD = """\
# Model families

Written by `python -m helpers.families` from the table that the tests run (`tests/modeling/test_families.py`), on random
models of two layers: base in NF4 (bitsandbytes 0.50, transformers 5.23) + LoRA on every linear but a mixture's experts -> merged:
the logits of PEFT's unmerged forward in fp32, from a base quantized while loading and from one saved in 4 bits ->
GPTQ block by block: the written file gives the states that the walk ended in -> loaded by transformers with optimum
2.3 and gptqmodel 7.7, or by gptqmodel's own loader: the logits of our own decoder (where both are named the tests load
with transformers). Blocks, linears and experts are found by structure, only Falcon's Linear class by its name: other
families of the same build are likely to work, and `requant check` says what it found.

| family | model_type | loaded again by | what is special |
|---|---|---|---|
"""
_FOOT = """
Not loaded by transformers: Conv1D, Falcon's own Linear and experts (`requant check` says why; vLLM and SGLang do not use
transformers' modules). Experts are written one by one under the names of the original checkpoint
(`model.layers.0.mlp.experts.0.gate_proj.qweight`; Mixtral: `block_sparse_moe.experts.0.w1`), which vLLM's loader reads
(0.32 on a CPU with AMX, which its kernel for quantized experts needs: `tests/deploy/test_vllm_families.py`).

No layout of Mixtral is read by both sides. vLLM 0.32 finds `model.layers.0.block_sparse_moe.experts.0.w1` and stops at
`model.layers.0.mlp...` (`tests/deploy/test_vllm.py`); gptqmodel 7.7 insists on `model.layers.0.mlp.experts.0.gate_proj`
(`up_proj`: w3, `down_proj`: w2) and on `mlp.gate`, and with these names loads our tensors and gives our logits
(`tests/merge/test_roundtrip.py`). Ours are the original checkpoint's, for servers.

Experts that the checkpoint holds in one tensor (gpt-oss, Qwen3.5 MoE, Qwen3-VL MoE, Granite MoE, Gemma 4, Llama 4) are merged,
adapters on them too, and quantized one by one: each on the tokens routed to it, under the names that vLLM 0.32's loader
reads (`...mlp.experts.0.gate_proj.qweight`; below what was loaded). Where no server reads them so but one reads them in
16 bit, they stay in 16 bit (`quantize.experts`; gpt-oss, which vLLM then reads in compressed-tensors). Those of DBRX and
JetMoE and Inkling's shared ones, whose classes are of their own, stay in 16 bit, since nobody reads them quantized:
`requant check` says who reads what (`UNSPLIT` in `pipeline/requant/deploy/engine_classes.py`). So do experts
that only images reach (ERNIE 4.5 VL: text and images have experts of their own, in one list in the file), since text says
nothing about their inputs. Experts without weights (LongCat Flash) return their input, as in its class.

In 16 bit at every size, since engines build them so: routers, indexers, gates of one output a head (`in_proj_b`,
`in_proj_a`, `shared_expert_gate`), Qwen 4's connections between layers. And matrices whose sizes are no multiple of 32,
like the input projection of some Mamba layers. What engines hold as one matrix is quantized alike or left together: q, k
and v; gate and up; `in_proj_qkv` and `in_proj_z`; `q_a_proj` and `kv_a_proj_with_mqa`; LFM2's `w1` and `w3`; in Qwen 4 the
index beside q, k and v (`tests/quantize/test_stage.py`, `tests/modeling/test_family_entries.py`).

Of a model with towers for images or sound the text decoder is quantized, on text alone; towers and projectors are
merged, adapters on them too (convolutions as well), and stay in 16 bit, which a rule in the config says by their names.
The class is the one that the config's `architectures` names, so that names on disk stay the original checkpoint's.
An adapter may name the language part as any class and release does: the text-only class, today's wrapper or one before
transformers 4.52 (`tests/merge/test_wrapper_names.py`, against PEFT on the wrapper). A base in 4 bits whose tower was
skipped runs whole (`tests/run/test_wrappers.py`). Blocks that attend to an image and are skipped on text, as in
Llama 3.2 Vision, stay in 16 bit.

Heads for multi-token prediction are copied into every checkpoint, whatever a family calls them, and `verify` compares
them with the source (18 families: `tests/merge/test_extra_heads.py`).

Encoders and decoders whose blocks all attend to an encoder (BERT, BART, Whisper) are refused by `check`; so are blocks
called more than once (HRM), and layers that share one block (Zamba: of the merge an adapter on the copies, of
`quantize` the model; `tests/merge/test_shared_weights.py`). The towers of Gemma 3n, FastVLM and Perception LM need the package
timm, with torchvision: the tests of them skip without. A matrix that
a file holds as one and transformers' class as several (qkv of the towers of Kimi K2.5, Nemotron H Omni, Qianfan), with rows
in another order or not, is read, merged into and written as the file has it (`tests/merge/test_cut_linears.py`); so are
convolutions and Linears held in parts (Kimi Linear, Bailing, OLMo hybrid; MiniMax M3), embeddings in tables (Molmo 2,
Qwen 4's n-grams: `tests/merge/test_embedding_tables.py`), and routers held transposed, with one bias for two of them
(ERNIE 4.5 VL: `tests/modeling/test_stored_parameters.py`), and gate and up row by row in turns (Inkling's MLPs and
experts: `tests/merge/test_interleaved_gates.py`; the MLP's one matrix is quantized with its rows as the file has them,
which vLLM multiplies by so; vLLM reads the experts of a layer as one tensor only, in 16 bit). Of BLT the blocks beside
the embedding of bytes are quantized, which are the local encoder's; the rest is merged and stays in 16 bit. So do
Evolla's adapters to proteins, which text never reaches. Other tensors that transformers makes of several while it
loads are refused.

A mixture whose experts training held in 4 bits under transformers 4 (`base.nf4.transformers: 4`, or a base saved so) is
merged and quantized; transformers 5 cannot hold that base, so `base` and `adapter` are measured block by block on our
own decoder's values, and `requant check` says so (`tests/merge/test_bases.py`).
"""


_SWEEP = """
## Every model type of transformers {version}

Each that transformers registers as a causal LM or as an image-text-to-text model, built tiny and random ({count} types;
one command, `python -m helpers.sweep`; results: `bench/results/{file}`). *Exact*: every weight of NF4 + LoRA on
all linears merged is PEFT's within 1e-5, and the model is quantized block by block to 8 bits and read back by our
decoder (how near its logits come to the merged model's is in the results). What of it was loaded in a server is below.

{lines}

*Refused*: before any work, but for those whose reason is what the calibration text reaches.
"""


MOST_TUNED = (  # by notebooks, examples and merge fixes of the trainers, 2026
    "qwen3_5", "qwen3", "llama", "gemma4", "gemma3", "qwen3_5_moe", "gpt_oss", "qwen3_vl", "qwen3_vl_moe", "qwen2", "mistral",
    "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_moe", "phi3", "gemma4_unified", "lfm2", "lfm2_moe", "lfm2_vl", "nemotron_h",
    "granitemoehybrid", "muse_glimmer", "glm4_moe", "glm4_moe_lite", "falcon_h1", "mllama", "gemma3n", "ernie4_5_moe",
    "ernie4_5_vl_moe", "gemma2", "cohere2", "smollm3", "olmo3", "llama4",
)  # fmt: skip
# What a row's error says, in words. A row has the first whose pattern is found in it.
REASONS = (
    (r"it is an encoder", "encoders, which read in both directions; as decoders (`is_decoder: true`) they are quantized: BERT "
     "and CamemBERT are (`tests/modeling/test_sweep.py`)"),
    (r"every block attends to", "decoders whose blocks all attend to an encoder's output, which text alone has not"),
    (r"has no class that generates text", "no next token: a classifier of images, a robot's actions, a canvas at once"),
    (r"changes \d+ weights that layers share", "layers that share a block: an adapter gave each a change of its own, which no "
     "file holds: train with these modules left out"),
    (r"called \d+ of its \d+ blocks", "blocks that run several times in a forward"),
    (r"blocks are reversible", "reversible blocks, which take two streams"),
    (r"moe\.gate_proj\.weight", "gate and up of all experts in two stacks, which transformers joins while it loads"),
    (r"pixel_values|flattened_patches|image_encoder_embeddings|Bbox", "wants an image with every text"),
    (r"exactly one of input_ids or inputs_embeds", "an encoder and a decoder"),
    (r"FineGrainedFP8Config", "a config that asks for FP8 by itself: transformers makes no 4-bit base of it"),
    (r"'dropout'", "codes of sound: the class in the list is of the decoder alone, whose config has no type of its own"),
    (r"drafts tokens for another model", "drafts for another model, whose keys and values it reads"),
)  # fmt: skip


def reason(outcome: Outcome) -> str:
    """Why a model type is refused or was not tried, in words."""
    return next(words for pattern, words in REASONS if re.search(pattern, outcome.error))


def _grouped(outcomes: Iterable[Outcome]) -> str:
    """Model types by reason, in the order of the reasons."""
    found: dict[str, list[str]] = {words: [] for _, words in REASONS}
    for outcome in outcomes:
        found[reason(outcome)].append(f"`{outcome.kind}`")
    return "".join(f"\n- {words}: {', '.join(kinds)}" for words, kinds in found.items() if kinds)


def _sweep() -> str:
    """The table of the sweep over all model types, from its results."""
    rows = json.loads(RESULTS.read_text())
    found: dict[str, list[Outcome]] = {}
    for row in rows:
        found.setdefault(Outcome(**row).verdict, []).append(Outcome(**row))
    lines = [
        f"**{verdict.capitalize()}** ({len(found[verdict])}): {', '.join(map(_shown, found[verdict]))}."
        for verdict in ("exact", "experts in 16 bit", "differs")
        if verdict in found
    ]
    lines += [
        f"**{v.capitalize()}** ({len(found[v])}):\n{_grouped(found[v])}" for v in ("refused", "not tried") if v in found
    ]
    return _SWEEP.format(version="5.23", count=len(rows), file=RESULTS.name, lines="\n\n".join(lines))


def _shown(outcome: Outcome) -> str:
    """A model type, with the difference where there is one."""
    return f"`{outcome.kind}`" + (f" (a weight by {outcome.merged:.1g})" if outcome.verdict == "differs" else "")


def document() -> str:
    """docs/families.md."""
    rows = []
    for family in FAMILIES:
        loads = ", ".join(family.loads) or "neither"
        left = f"; 16 bit: {', '.join(family.left)}" if family.left else ""
        rows.append(f"| {family.name} | `{family.kind}` | {loads} | {family.note}{left} |\n")
    return _HEAD + "".join(rows) + _FOOT + _sweep() + served.section(_quantized())


def _quantized() -> list[str]:
    """The classes that the sweep quantized."""
    outcomes = [Outcome(**row) for row in json.loads(RESULTS.read_text())]
    return [o.made for o in outcomes if o.verdict in ("exact", "experts in 16 bit")]


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document())

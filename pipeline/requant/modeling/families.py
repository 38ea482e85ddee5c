"""Model families: what the structure of a model does not tell, one declarative entry each.

Blocks, matrices and experts are found by structure (`block_walk`, `linears`, `moe`); renamed tensors and modules kept
in fp32 are read off transformers (`skeleton`). An entry names the rest: a linear class of its own, what engines fuse,
and how they cut a matrix for several GPUs. Other code asks by the names of modules, so the sets at the end are unions
of all entries: a family whose modules are called like those of another needs no entry of its own, only its model type
in one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")
"""A module of one expert -> the module of its layer's experts, which engines hold as one. So in every family here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fused:
    """Linears of a checkpoint that engines load as one matrix: all of them share one setting, or stay in 16 bit.

    parts: last part of their names, with the module around them where only there they are one matrix. pattern: an
    fnmatch pattern that covers `parts` and no other linear. fewer: whether blocks may lack parts behind the first,
    since they take them from elsewhere; engines build the same matrix there.
    """

    parts: tuple[str, ...]
    pattern: str
    fewer: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One build of transformer blocks. Names are the last part of a module's name.

    model_types: of transformers, without claim to be complete. linear_classes: subclasses of nn.Linear whose forward is
    the same product. expert_classes: fused experts, not marked as such by transformers, whose tensors are gate_up_proj
    and down_proj and whose product is down(act(gate) * up). fused: an engine's matrix -> the linears it is made of. For
    several GPUs, where an engine cuts matrices: by_inputs: cut by their inputs, for they lead back into the residual
    stream; fused_heads: q, k and v in one, cut by attention heads; key_heads: cut by key heads, repeated where they are
    fewer than GPUs; uncut: whole on every GPU. called: modules around linears -> what engines call them when they look
    up their settings, where that is not their name in the checkpoint.
    """

    model_types: tuple[str, ...]
    linear_classes: frozenset[str] = frozenset()
    expert_classes: frozenset[str] = frozenset()
    fused: Mapping[str, Fused] | None = None
    by_inputs: frozenset[str] = frozenset()
    fused_heads: frozenset[str] = frozenset()
    key_heads: frozenset[str] = frozenset()
    uncut: frozenset[str] = frozenset()
    called: Mapping[str, str] | None = None


_QKV = Fused(  # Gemma 4: keys that are the values too; keys and values of an earlier block
    parts=("q_proj", "k_proj", "v_proj"), pattern="[qkv]_proj", fewer=True
)
_GATE_UP = Fused(parts=("gate_proj", "up_proj"), pattern="[gu]*_proj")
_LATENT = Fused(parts=("q_a_proj", "kv_a_proj_with_mqa"), pattern="*_a_proj*")
_DELTA = {  # of gated delta nets
    "in_proj_qkvz": Fused(parts=("in_proj_qkv", "in_proj_z"), pattern="in_proj_[qz]*"),
    "in_proj_ba": Fused(parts=("in_proj_b", "in_proj_a"), pattern="in_proj_[ba]"),
}

FAMILIES = (
    Family(
        model_types=(
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "stablelm",
            "cohere",
            "cohere2",
            "olmo2",
            "granite",
            "smollm3",
        ),
        fused={"qkv_proj": _QKV, "gate_up_proj": _GATE_UP},
        by_inputs=frozenset({"o_proj", "down_proj"}),
        key_heads=frozenset({"k_proj", "v_proj"}),
    ),
    Family(  # routers stay whole; in transformers 5 experts are stacked, in checkpoints they are single
        model_types=("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"),
        fused={"qkv_proj": _QKV, "gate_up_proj": _GATE_UP},
        by_inputs=frozenset({"o_proj", "down_proj"}),
        key_heads=frozenset({"k_proj", "v_proj"}),
        uncut=frozenset({"gate", "shared_expert_gate"}),
    ),
    Family(  # latent attention: the projections into the latent space are whole on every GPU; two engines, two names
        model_types=("deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
        fused={"gate_up_proj": _GATE_UP, "fused_qkv_a_proj": _LATENT, "fused_qkv_a_proj_with_mqa": _LATENT},
        by_inputs=frozenset({"o_proj", "down_proj"}),
        uncut=frozenset({"gate", "q_a_proj", "kv_a_proj_with_mqa"}),
    ),
    Family(  # a gated delta net in most blocks
        model_types=("qwen3_5", "qwen3_5_text", "qwen3_next"),
        fused={"qkv_proj": _QKV, "gate_up_proj": _GATE_UP} | _DELTA,
        by_inputs=frozenset({"o_proj", "down_proj", "out_proj"}),
        key_heads=frozenset({"k_proj", "v_proj"}),
    ),
    Family(  # an index's projection is one matrix with q, k and v; so are key and value of n-grams
        model_types=("qwen4_exp", "qwen4_exp_text"),
        fused={
            "self_attn.qkv_proj": Fused(
                parts=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.indexer.index_qk_proj"),
                pattern="self_attn.[qkvi]*_proj",
            ),
            "ple.kv_proj": Fused(parts=("ple.key_proj", "ple.value_proj"), pattern="ple.[kv]*_proj"),
        },
    ),
    Family(  # a projection for relative positions is one matrix with q, k and v; gate and up take turns in one
        model_types=("inkling_mm_model", "inkling_text"),
        fused={
            "self_attn.qkvr": Fused(
                parts=tuple(f"self_attn.{part}_proj" for part in "qkvr"), pattern="self_attn.[qkvr]_proj"
            ),
        },
        by_inputs=frozenset({"o_proj", "down_proj"}),
        key_heads=frozenset({"k_proj", "v_proj"}),
    ),
    Family(
        model_types=("olmo_hybrid",),
        fused={
            "qkv_proj": _QKV,
            "gate_up_proj": _GATE_UP,
            "linear_attn.in_proj_qkvg": Fused(
                parts=tuple(f"linear_attn.{part}_proj" for part in "qkvg"), pattern="linear_attn.[qkvg]_proj"
            ),
        },
        by_inputs=frozenset({"o_proj", "down_proj"}),
        key_heads=frozenset({"k_proj", "v_proj"}),
    ),
    Family(  # short convolutions
        model_types=("lfm2", "lfm2_moe"),
        fused={"qkv_proj": _QKV, "w13": Fused(parts=("w1", "w3"), pattern="w[13]")},
        by_inputs=frozenset({"out_proj", "w2"}),
        key_heads=frozenset({"k_proj", "v_proj"}),
    ),
    Family(  # Mamba's mixers beside attention
        model_types=("falcon_h1", "granitemoehybrid", "jamba"),
        fused={"qkv_proj": _QKV, "gate_up_proj": _GATE_UP},
        by_inputs=frozenset({"o_proj", "down_proj", "out_proj"}),
        key_heads=frozenset({"k_proj", "v_proj"}),
        called={"mamba": "mixer"},
    ),
    Family(  # experts of text and of images; in checkpoints one list, in engines two modules
        model_types=("ernie4_5_vl_moe",),
        fused={"qkv_proj": _QKV, "gate_up_proj": _GATE_UP},
        by_inputs=frozenset({"o_proj", "down_proj"}),
        key_heads=frozenset({"k_proj", "v_proj"}),
        called={
            "text_moe.experts": "text_experts",
            "vision_moe.experts": "vision_experts",
            "text_moe.gate": "text_experts_gate",
            "vision_moe.gate": "vision_experts_gate",
        },
    ),
    Family(
        model_types=("llama4", "llama4_text"),
        expert_classes=frozenset({"Llama4TextExperts"}),
        fused={"qkv_proj": _QKV, "gate_up_proj": _GATE_UP},
        by_inputs=frozenset({"o_proj", "down_proj"}),
        key_heads=frozenset({"k_proj", "v_proj"}),
    ),
    Family(  # latent attention twice in each block; experts without weights
        model_types=("longcat_flash",),
        expert_classes=frozenset({"LongcatFlashExperts"}),
        fused={"gate_up_proj": _GATE_UP, "fused_qkv_a_proj": _LATENT},
        by_inputs=frozenset({"o_proj", "down_proj"}),
        uncut=frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
    ),
    Family(
        model_types=("granitemoe",),
        fused={"qkv_proj": _QKV},
        by_inputs=frozenset({"o_proj", "output_linear"}),
        key_heads=frozenset({"k_proj", "v_proj"}),
    ),
    Family(  # fused in the checkpoint already
        model_types=("phi3", "glm4"),
        by_inputs=frozenset({"o_proj", "down_proj"}),
        fused_heads=frozenset({"qkv_proj"}),
    ),
    Family(
        model_types=("phi",),
        fused={"qkv_proj": _QKV},
        by_inputs=frozenset({"dense", "fc2"}),
        key_heads=frozenset({"k_proj", "v_proj"}),
    ),
    Family(
        model_types=("starcoder2",),
        fused={"qkv_proj": _QKV},
        by_inputs=frozenset({"o_proj", "c_proj"}),
        key_heads=frozenset({"k_proj", "v_proj"}),
    ),
    Family(
        model_types=("opt",),
        fused={"qkv_proj": _QKV},
        by_inputs=frozenset({"out_proj", "fc2"}),
        key_heads=frozenset({"k_proj", "v_proj"}),
    ),
    Family(model_types=("gpt2",), by_inputs=frozenset({"c_proj"}), fused_heads=frozenset({"c_attn"})),
    Family(
        model_types=("gpt_neox",),
        by_inputs=frozenset({"dense", "dense_4h_to_h"}),
        fused_heads=frozenset({"query_key_value"}),
    ),
    Family(  # bitsandbytes does not know its class as a Linear: a base in 4 bits holds it in 16
        model_types=("falcon",),
        linear_classes=frozenset({"FalconLinear"}),
        by_inputs=frozenset({"dense", "dense_4h_to_h"}),
        fused_heads=frozenset({"query_key_value"}),
    ),
    Family(  # one matrix in the file, several modules in transformers' class: named after the first of them
        model_types=("molmo2",),
        by_inputs=frozenset({"o_proj", "down_proj"}),
        fused_heads=frozenset({"q_proj_joined"}),
    ),
    Family(model_types=("mpt",), by_inputs=frozenset({"out_proj", "down_proj"}), fused_heads=frozenset({"Wqkv"})),
)

IN_16_BIT = re.compile(
    r"(.*\.)?(in_proj_(a|b|ba)|linear_attn\.a_proj|b_proj|shared_expert_gate|gate\.wg"
    r"|indexer\.(\w+\.)*(wk|weights_proj)|\w*router\w*(\..+)?|altup\..+|vision_moe\..+"
    r"|\w*hyper_connection\w*\..+|adapter\.(query|\w+_(protein|structure|msa)|out_proj|ff\.fc[12]))"
)
"""Linears that stay in 16 bit: routers, gates of one output a head, what engines build without quantized weights.

And experts of images and Evolla's adapters to proteins: text, on which a model is calibrated, never reaches them.
"""

NEEDS_BFLOAT16 = frozenset({"gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "glm4"})
"""Model types whose activations exceed float16's range: in float16 they give NaN, and vLLM refuses it."""

LINEAR_CLASSES = frozenset[str]().union(*(f.linear_classes for f in FAMILIES))
EXPERT_CLASSES = frozenset[str]().union(*(f.expert_classes for f in FAMILIES))
FUSED: dict[str, Fused] = {name: fused for f in FAMILIES for name, fused in (f.fused or {}).items()}
BY_INPUTS = frozenset[str]().union(*(f.by_inputs for f in FAMILIES))
FUSED_HEADS = frozenset[str]().union(*(f.fused_heads for f in FAMILIES))
KEY_HEADS = frozenset[str]().union(*(f.key_heads for f in FAMILIES))
UNCUT = frozenset[str]().union(*(f.uncut for f in FAMILIES))
CALLED: dict[str, str] = {name: other for f in FAMILIES for name, other in (f.called or {}).items()}


def fused_groups(names: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(fused name, its parts, one or more) of every matrix that engines make of some of these linears."""
    for name, fused in FUSED.items():
        for stem, parts in _groups(fused, names):
            yield stem + name, parts


def called(linear: str) -> str | None:
    """The name by which engines look up a linear's settings, where that is not its own; None: it is."""
    other = f".{linear}."
    for module, name in CALLED.items():
        other = other.replace(f".{module}.", f".{name}.")
    return None if other == f".{linear}." else other[1:-1]


def fused_patterns(names: Collection[str]) -> dict[str, str]:
    """Linear -> an fnmatch pattern that covers all that engines fuse it with, of those that are fused."""
    found: dict[str, str] = {}
    for fused in sorted(FUSED.values(), key=lambda f: len(f.parts)):
        for stem, parts in _groups(fused, names):
            if len(parts) > 1:
                found |= dict.fromkeys(parts, stem + fused.pattern)
    return found


def in_16_bit(names: Collection[str], odd: Collection[str]) -> set[str]:
    """Those of the linears `names` that stay in 16 bit whatever a recipe says.

    odd: those whose sizes no layout packs. What an engine fuses with one that stays, stays too: it is one matrix there.
    """
    found = {name for name in names if name in odd or IN_16_BIT.fullmatch(name)}
    found |= _mamba_1(names)
    groups, count = [parts for _, parts in fused_groups(names)], -1
    while len(found) != count:
        count = len(found)
        for parts in groups:
            if not found.isdisjoint(parts):
                found.update(parts)
    return found


def _mamba_1(names: Collection[str]) -> set[str]:
    """Those of the linears `names` that belong to a first Mamba's mixers: vLLM builds none of them quantized.

    None where all do: of a model of such mixers alone nothing else could be quantized.
    """
    mixers = {name.removesuffix("x_proj") for name in names if name.endswith(".x_proj")}
    found = {name for name in names if name[: name.rfind(".") + 1] in mixers}
    return set() if len(found) == len(names) else found


def _groups(fused: Fused, names: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(stem, full names of the parts) of each place where all parts are, or the first where some may be missing."""
    first = fused.parts[0]
    for linear in names:
        if linear.endswith("." + first):
            stem = linear.removesuffix(first)
            parts = tuple(stem + part for part in fused.parts if stem + part in names)
            if fused.fewer or len(parts) == len(fused.parts):
                yield stem, parts


def expert_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Module of a layer's experts -> those of these linears that belong to it."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if match := EXPERT.fullmatch(name):
            groups.setdefault(match[1], []).append(name)
    return groups

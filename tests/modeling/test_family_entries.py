"""`requant.modeling.families`: entries name real model types; the recipe's copy agrees."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from helpers.families import BY_KIND
from transformers import CONFIG_MAPPING

from requant.modeling import families
from requant.recipe import quantize_section


def test_every_model_type_is_one_of_transformers_and_in_one_entry() -> None:
    named = [kind for family in families.FAMILIES for kind in family.model_types]
    assert len(named) == len(set(named))
    assert not [kind for kind in named if kind not in CONFIG_MAPPING]


def test_every_proven_family_has_an_entry() -> None:
    assert BY_KIND.keys() <= {kind for family in families.FAMILIES for kind in family.model_types}


def test_the_recipe_knows_the_same_fused_linears() -> None:
    anywhere = [fused for fused in families.FUSED.values() if "." not in fused.pattern]
    assert {fused.parts: fused.pattern for fused in anywhere} == quantize_section._FUSED


def test_one_engine_name_has_one_meaning() -> None:
    for family in families.FAMILIES:
        for name, fused in (family.fused or {}).items():
            assert families.FUSED[name] == fused


@pytest.mark.parametrize("fused", families.FUSED.values(), ids=families.FUSED.keys())
def test_a_pattern_covers_the_parts_and_no_other_linear(fused: families.Fused) -> None:
    linears = {part for other in families.FUSED.values() for part in other.parts} | families.BY_INPUTS
    assert {name for name in linears if fnmatchcase(name, fused.pattern)} == set(fused.parts)


def test_a_linear_is_cut_in_one_way() -> None:
    ways = [families.BY_INPUTS, families.FUSED_HEADS, families.KEY_HEADS, families.UNCUT]
    assert sum(map(len, ways)) == len(frozenset().union(*ways))


def test_what_engines_were_read_to_do() -> None:
    """vLLM 0.32 and SGLang: the names in their models, each once."""
    assert list(families.FUSED) == [
        "qkv_proj", "gate_up_proj", "fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa", "in_proj_qkvz", "in_proj_ba",
        "self_attn.qkv_proj", "ple.kv_proj", "self_attn.qkvr", "linear_attn.in_proj_qkvg", "w13",
    ], "rules are written in this order"  # fmt: skip
    assert {"FalconLinear"} == families.LINEAR_CLASSES
    assert {
        "o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense", "dense_4h_to_h", "output_linear", "w2",
    } == families.BY_INPUTS  # fmt: skip
    assert {"qkv_proj", "query_key_value", "c_attn", "Wqkv", "q_proj_joined"} == families.FUSED_HEADS
    assert {"k_proj", "v_proj"} == families.KEY_HEADS
    assert {"gate", "shared_expert_gate", "q_a_proj", "kv_a_proj_with_mqa"} == families.UNCUT


NET = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")


@pytest.mark.parametrize(
    ("names", "odd", "stays"),
    [
        (NET, (), {"in_proj_b", "in_proj_a"}),
        (NET, ("in_proj_z",), {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}),
        (("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj"), ("kv_a_proj_with_mqa",), {"q_a_proj", "kv_a_proj_with_mqa"}),
        (("q_proj", "k_proj", "v_proj", "o_proj"), ("k_proj",), {"q_proj", "k_proj", "v_proj"}),
        (("q_proj", "k_proj", "v_proj", "g_proj"), ("g_proj",), {"g_proj"}),
        (("q_proj", "k_proj", "o_proj"), ("k_proj",), {"q_proj", "k_proj"}),
        (("w1", "w2", "w3"), ("w3",), {"w1", "w3"}),
        (("router.layer", "mlp.gate_proj"), (), {"router.layer"}),
    ],
)
def test_what_stays_takes_along_what_engines_fuse_it_with(
    names: tuple[str, ...], odd: tuple[str, ...], stays: set[str]
) -> None:
    found = families.in_16_bit([f"layers.0.a.{n}" for n in names], [f"layers.0.a.{n}" for n in odd])
    assert found == {f"layers.0.a.{n}" for n in stays}


def test_qwen_4_as_engines_build_it() -> None:
    """vLLM 0.33 and SGLang 0.5.23: connections in 16 bit; in vLLM the index is one matrix with q, k and v.

    gptqmodel 7.7 leaves the index in 16 bit, so that vLLM finds some but not all parts of that matrix quantized.
    """
    a = "layers.1."
    attention = [f"{a}self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "indexer.index_qk_proj", "o_proj")]
    mixing = [
        f"{a}{place}_hyper_connection.{n}"
        for place in ("attn", "mlp")
        for n in ("input_mix_weight_down", "input_mix_weight_up", "block_inject_weight")
    ]
    ngrams = [f"{a}ple.key_proj", f"{a}ple.value_proj"]
    every = [*attention, *mixing, *ngrams]
    assert families.in_16_bit(every, []) == set(mixing)
    assert families.in_16_bit(every, attention[3:4]) == {*mixing, *attention[:4]}
    groups = dict(families.fused_groups(every))
    assert groups[f"{a}self_attn.qkv_proj"] == tuple(attention[:4])
    assert groups[f"{a}ple.kv_proj"] == tuple(ngrams)
    patterns = families.fused_patterns(every)
    assert {n for n in every if fnmatchcase(n, patterns[attention[0]])} == set(attention[:4])
    assert {n for n in every if fnmatchcase(n, patterns[ngrams[0]])} == set(ngrams)


def test_blocks_without_v_or_k_are_one_matrix_in_engines_too() -> None:
    """Gemma 4: keys that are the values too (vLLM, SGLang), and blocks with q alone (SGLang's `qkv_proj`)."""
    names = ["a.q_proj", "a.k_proj", "b.q_proj", "c.k_proj", "c.v_proj", "d.gate_proj"]
    assert list(families.fused_groups(names)) == [
        ("a.qkv_proj", ("a.q_proj", "a.k_proj")),
        ("b.qkv_proj", ("b.q_proj",)),
    ]
    assert families.fused_patterns(names) == dict.fromkeys(names[:2], "a.[qkv]_proj")


def test_a_gate_is_fused_only_inside_of_its_delta_net() -> None:
    names = [f"layers.0.linear_attn.{part}_proj" for part in "qkvg"]
    assert families.in_16_bit(names, names[3:]) == set(names)
    assert set(families.fused_patterns(names).values()) == {"layers.0.linear_attn.[qkvg]_proj"}

"""`requant.modeling.families`: entries name real model types; the recipe's copy agrees."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from helpers.families import BY_KIND
from transformers import CONFIG_MAPPING

from requant.modeling import families
from requant.recipe import model_sections


def test_every_model_type_is_one_of_transformers_and_in_one_entry() -> None:
    named = [kind for family in families.FAMILIES for kind in family.model_types]
    assert len(named) == len(set(named))
    assert not [kind for kind in named if kind not in CONFIG_MAPPING]


def test_every_proven_family_has_an_entry() -> None:
    assert BY_KIND.keys() <= {kind for family in families.FAMILIES for kind in family.model_types}


def test_the_recipe_knows_the_same_fused_linears() -> None:
    assert {fused.parts: fused.pattern for fused in families.FUSED.values()} == model_sections._FUSED


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
    assert list(families.FUSED) == ["qkv_proj", "gate_up_proj"], "rules are written in this order"
    assert {"FalconLinear"} == families.LINEAR_CLASSES
    assert {
        "o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense", "dense_4h_to_h", "output_linear",
    } == families.BY_INPUTS  # fmt: skip
    assert {"qkv_proj", "query_key_value", "c_attn", "Wqkv"} == families.FUSED_HEADS
    assert {"k_proj", "v_proj"} == families.KEY_HEADS
    assert {"gate", "shared_expert_gate", "q_a_proj", "kv_a_proj_with_mqa"} == families.UNCUT

"""`requant.adapters.targets` against PEFT's own matching of names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import pico
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

from requant.adapters import peft_directory, targets
from requant.modeling import linears

MODULES = [
    *(f"model.layers.{i}.self_attn.{p}" for i in (0, 1, 10) for p in ("q_proj", "v_proj")),
    *(f"model.language_model.layers.{i}.mlp.experts.{e}.w1" for i in (0, 1) for e in (0, 1)),
    "model.layers.1.mlp.down_proj", "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn", "lm_head",
    "model.embed_tokens", "q_proj", "score.0.q_proj", "my_q_proj",
]  # fmt: skip
NAMES = st.sampled_from(
    [
        "q_proj",
        "v_proj",
        "self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "w1",
        "c_attn",
        "lm_head",
        "proj",
        "0.w1",
    ]
)
REGEXES = st.sampled_from(
    [
        r".*q_proj",
        r"q_proj",
        r".*layers\.(0|1)\..*",
        r"(?:.*?(?:language|text).*?(?:w1).*?)|(?:\bmodel\.layers.*)",
        ".*",
    ]
)
SETTINGS = st.fixed_dictionaries(
    {"target_modules": st.one_of(st.lists(NAMES, max_size=3), REGEXES)},
    optional={
        "exclude_modules": st.one_of(st.none(), st.lists(NAMES, max_size=2), REGEXES),
        "modules_to_save": st.one_of(st.none(), st.lists(NAMES, max_size=2)),
        "layers_to_transform": st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 10), max_size=2)),
        "layers_pattern": st.one_of(
            st.none(), st.sampled_from(["layers", "h", "experts", "", "language_model.layers"]),
            st.lists(st.sampled_from(["layers", "h", "experts"]), max_size=2),
        ),
    },
)  # fmt: skip


@given(config=SETTINGS, module=st.sampled_from(MODULES))
def test_a_module_is_a_target_where_peft_says_so(config: dict[str, Any], module: str) -> None:
    theirs = check_target_module_exists(SimpleNamespace(target_parameters=None, **config), module)
    assert targets.is_target(config, module) == bool(theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
        {"target_modules": r".*\.1\..*(q|k)_proj"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ],
)
def test_real_adapters_hold_exactly_their_targets(tmp_path: Path, settings: dict[str, Any]) -> None:
    made = pico.model()
    pico.train(made, tmp_path, **settings)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    held = set(peft_directory.load(tmp_path).folds)
    fresh = pico.model()
    names = {n for n, m in fresh.named_modules() if linears.is_linear(m)}
    if targets.every_linear(config):
        assert held == names - {"lm_head"}
    else:
        assert held == {n for n in names if targets.is_target(config, n)}

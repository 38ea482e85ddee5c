"""What engines look up in a quantization config by names of their own (vLLM 0.32)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico, tiny

from requant.modeling import families
from requant.numerics.grid import Grid


def written(kind: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """The quantization config of a tiny model of a type."""
    source = pico.save(tiny.model(kind, **changes), folder / "model", torch.bfloat16)
    pico.packed(source, folder / "gptq", Grid(4, 32), dtype=torch.bfloat16)
    config: dict[str, Any] = json.loads((folder / "gptq" / "config.json").read_text())["quantization_config"]
    return config


def listed(config: dict[str, Any], name: str) -> bool:
    """Whether vLLM finds a module's name of its own in the list."""
    return any(part in name for group in config["modules_in_block_to_quantize"] for part in group)


def excluded(config: dict[str, Any], name: str) -> bool:
    return any(rule.startswith("-:") and re.match(rule[2:], name) for rule in config["dynamic"])


@pytest.mark.slow
def test_a_mixer_has_another_name_and_another_number_in_vllm(tmp_path: Path) -> None:
    """Falcon H1: model.layers.1.mamba is model.1.mixer there, and its attention has no module of its own."""
    config = written("falcon_h1", tmp_path)
    assert listed(config, "model.1.mixer.out_proj")
    assert all(listed(config, f"model.layers.1.{part}") for part in ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert not listed(config, "model.1.mixer.in_proj"), "328 outputs: in 16 bit"
    assert excluded(config, "model.layers.1.mamba.in_proj")
    assert excluded(config, "model.layers.1.mixer.in_proj"), "SGLang's name"


def test_parts_that_an_engine_takes_a_stored_matrix_to_have(tmp_path: Path) -> None:
    """GLM-4 stores gate_up_proj; vLLM asks the list for gate_proj and up_proj."""
    config = written("glm4", tmp_path)
    for part in ("gate_proj", "up_proj", "gate_up_proj"):
        assert listed(config, f"model.layers.0.mlp.{part}")
    assert "dynamic" not in config


def test_a_name_that_is_also_left_is_listed_with_the_module_around_it(tmp_path: Path) -> None:
    """Jamba: Mamba's own out_proj stays in 16 bit, attention's o_proj does not; feed_forward's beside experts'."""
    config = written("jamba", tmp_path)
    assert listed(config, "model.layers.1.o_proj")
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        assert not listed(config, f"model.layers.0.mixer.{name}")
        assert excluded(config, f"model.layers.0.mamba.{name}")


def test_only_a_first_mambas_mixer_is_left_beside_others() -> None:
    mixer = {f"model.layers.0.mixer.{part}" for part in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    attention = {"model.layers.1.self_attn.o_proj", "model.layers.1.mixer.out_proj"}
    assert families.in_16_bit(mixer | attention, []) == mixer
    assert not families.in_16_bit(mixer, []), "of a model of such mixers alone nothing else could be quantized"

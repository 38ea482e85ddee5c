"""`requant.merge.config_agreement`: a config.json of other weights is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import pico
from helpers.e2e import edit_json

from requant.adapters import peft_directory
from requant.errors import InputError
from requant.run import prepare


def planned(tmp_path: Path, kind: str = "llama", **changes: Any) -> None:
    made = pico.model(kind)
    pico.save(made, tmp_path / "base")
    pico.train(made, tmp_path / "adapter", target_modules="all-linear")
    edit_json(tmp_path / "base" / "config.json", **changes)
    prepare.plan_merge(tmp_path / "base", peft_directory.load(tmp_path / "adapter"), None, trust_remote_code=False)


@pytest.mark.parametrize("kind", ["llama", *pico._OTHER])
def test_every_family_agrees_with_its_own(tmp_path: Path, kind: str) -> None:
    planned(tmp_path, kind)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 10}, "model.embed_tokens.weight is [96, 64] instead of [10, 64]; lm_head.weight is [96, 64]"),
        ({"hidden_size": 0}, "model.embed_tokens.weight is [96, 64] instead of [96, 0]"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight [64, 64] is missing"),
        ({"intermediate_size": 96}, "mlp.gate_proj.weight is [128, 64] instead of [96, 64]"),
        ({"num_key_value_heads": 4}, "self_attn.k_proj.weight is [32, 64] instead of [64, 64]"),
    ],
)
def test_another_models_config_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        planned(tmp_path, **changes)
    assert "config.json does not describe these weights: " in str(caught.value)
    assert says in str(caught.value)

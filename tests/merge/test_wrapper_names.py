"""Adapters on models with towers: whichever class and release named their modules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.merge.adapter_completeness import missing
from requant.modeling import skeleton

pytestmark = pytest.mark.filterwarnings("ignore")
WRAPPERS = ("gemma3", "qwen2_5_vl", "mistral3")
TODAY = "base_model.model.model.language_model.layers."
SPELLED = {  # how classes and releases call the blocks of the language part
    "of today's wrapper": TODAY,
    "of the text-only class": "base_model.model.model.layers.",
    "of an older wrapper": "base_model.model.language_model.model.layers.",
    "of the text-only model": "base_model.model.layers.",
    "wrapped twice": "base_model.model.base_model.model.model.language_model.layers.",
}
TEXT = r".*language_model\.layers.*\.(q_proj|v_proj|up_proj|down_proj)"
OLDER_TOWERS = {  # today's names -> those of transformers before 4.52
    "gemma3": [(r"model\.model\.(vision_tower|multi_modal_projector)", r"model.\1")],
    "mistral3": [(r"model\.model\.(vision_tower|multi_modal_projector)", r"model.\1")],
    "qwen2_5_vl": [(r"model\.model\.visual", "model.visual")],
}


def trained(kind: str, folder: Path, **lora: Any) -> tuple[dict[str, Tensor], Path]:
    """PEFT's merged weights, and the wrapper's directory in `folder` beside an adapter on it."""
    made = tiny.model(kind)
    base = pico.save(made, folder / "base", torch.float32)
    live = pico.train(made, folder / "adapter", **lora)
    merged = live.merge_and_unload().state_dict()
    return {name: value.clone() for name, value in merged.items()}, base


def respell(adapter: Path, *rules: tuple[str, str]) -> None:
    """Rename the tensors of an adapter's file by regular expressions."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for pattern, into in rules:
        renamed = {re.sub(pattern, into, name): value for name, value in tensors.items()}
        assert renamed.keys() != tensors.keys(), pattern
        tensors = renamed
    save_file(tensors, file, metadata={"format": "pt"})


def assert_merged(expected: dict[str, Tensor], folder: Path, base: Path) -> list[str]:
    """Merge; every weight of the file, loaded by transformers, is PEFT's. The warnings of `check`."""
    plan, _, _ = pico.merged(base, folder / "adapter", folder / "merged")
    loaded = pico.reload(folder / "merged").state_dict()
    assert loaded.keys() == expected.keys()
    worst = max(pico.relative(loaded[name].double(), value.double()) for name, value in expected.items())
    assert worst < 1e-6
    names = Checkpoint(base).keys() | ({"lm_head.weight"} if plan.untied else set())
    assert Checkpoint(folder / "merged").keys() == names, "the original checkpoint's"
    return missing(plan.adapter, plan, skeleton.open_model(base))


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("prefix", SPELLED.values(), ids=SPELLED.keys())
def test_an_adapter_on_the_language_part_is_merged_by_any_name(tmp_path: Path, kind: str, prefix: str) -> None:
    expected, base = trained(kind, tmp_path, target_modules=TEXT)
    pico.edit_adapter(tmp_path / "adapter", target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    if prefix != TODAY:
        respell(tmp_path / "adapter", (re.escape(TODAY), prefix))
    notes = assert_merged(expected, tmp_path, base)
    of_the_text_alone = prefix.endswith("model.model.layers.") and "language" not in prefix
    assert not of_the_text_alone or not notes, "towers were no part of the model that was trained"


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("older", [False, True])
def test_an_adapter_on_tower_and_projector_is_merged(tmp_path: Path, kind: str, older: bool) -> None:
    expected, base = trained(kind, tmp_path, target_modules="all-linear")
    if older:
        respell(tmp_path / "adapter", (re.escape(TODAY), SPELLED["of an older wrapper"]), *OLDER_TOWERS[kind])
    assert_merged(expected, tmp_path, base)


@pytest.mark.parametrize("tensor", ["embed_tokens", "lm_head"])
def test_the_ends_of_a_wrapper_are_found_by_older_names(tmp_path: Path, tensor: str) -> None:
    expected, base = trained("mistral3", tmp_path, target_modules=TEXT, modules_to_save=[tensor])
    today = {"embed_tokens": r"model\.model\.language_model\.embed", "lm_head": r"model\.lm_head"}[tensor]
    older = {"embed_tokens": "model.language_model.model.embed", "lm_head": "model.language_model.lm_head"}[tensor]
    respell(tmp_path / "adapter", (re.escape(TODAY), SPELLED["of an older wrapper"]), (today, older))
    assert_merged(expected, tmp_path, base)


@pytest.mark.parametrize("prefix", [SPELLED["of an older wrapper"], TODAY])
def test_an_adapter_of_a_wrapper_is_merged_onto_the_text_alone(tmp_path: Path, prefix: str) -> None:
    expected, base = trained("gemma3_text", tmp_path, target_modules=["q_proj", "down_proj"])
    respell(tmp_path / "adapter", (re.escape(SPELLED["of the text-only class"]), prefix))
    assert not assert_merged(expected, tmp_path, base)


def test_an_adapter_on_a_tower_is_refused_where_the_base_has_none(tmp_path: Path) -> None:
    trained("gemma3", tmp_path, target_modules="all-linear")
    base = pico.save(tiny.model("gemma3_text"), tmp_path / "text", torch.float32)
    with pytest.raises(InputError, match=r"adapted tensors do not exist in the base .*vision_tower"):
        pico.merged(base, tmp_path / "adapter", tmp_path / "merged")

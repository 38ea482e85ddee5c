"""A whole run on models with a tower: the text decoder is quantized, the tower kept."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico, tiny
from helpers.e2e import run

from requant.checkpoint.reader import Checkpoint

WORDS = 320  # of the model: more than the tokenizer has, so that no text holds the placeholder of an image
PLACES = ("image_token_index", "boi_token_index", "eoi_token_index", "image_token_id", "video_token_id")


def wrapped(project: Path, out: Path, kind: str) -> dict[str, Any]:
    """A base with a tower and a LoRA on all its linears in `out`; the recipe's changes."""
    default = tiny.config(kind).to_dict()
    changes = {name: WORDS - 1 for name in PLACES if name in default}
    made = tiny.model(kind, **changes, **{"text_config.vocab_size": WORDS})
    base = pico.save(made, out / "base", torch.bfloat16)
    for file in (project / "base").glob("tokenizer*"):
        shutil.copy(file, base)
    pico.train(made, out / "adapter", target_modules="all-linear")
    return {
        "base.model": str(base), "base.original": None, "adapter": str(out / "adapter"),
        "base.nf4": {"quant_type": "nf4", "double_quant": False}, "evaluate.variants": ["base", "adapter", "merged", "gptq"],
        "gates": [],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5_moe"])
def test_a_run_keeps_the_tower_and_says_so(project: Path, tmp_path: Path, kind: str) -> None:
    outcome = run(project, tmp_path / "runs", wrapped(project, tmp_path, kind))
    assert outcome.ran[-1] == "report"
    gptq = Checkpoint(tmp_path / "runs" / "pico" / "gptq")
    merged = Checkpoint(tmp_path / "runs" / "pico" / "merged")
    tower = [name for name in merged if re.search(r"vision_tower|visual", name)]
    assert tower
    assert all(name in gptq for name in tower), "every tensor of the tower under its own name"
    config = json.loads((gptq.path / "config.json").read_text())
    assert config["architectures"] == [type(tiny.model(kind)).__name__]
    rules = [rule.removeprefix("-:") for rule in config["quantization_config"]["dynamic"] if rule.startswith("-:")]
    linear = next(name for name in tower if name.endswith(".weight") and len(merged[name].shape) == 2)
    for prefix in ("", "model."):  # engines drop or keep the outer names
        spelled = prefix + linear.removeprefix("model.").removesuffix(".weight")
        assert any(re.match(rule, spelled) for rule in rules), spelled
    packed = [name.removesuffix(".qweight") for name in gptq if name.endswith(".qweight")]
    assert packed
    assert not any(re.match(rule, name) for rule in rules for name in packed)
    if kind == "qwen3_5_moe":
        assert any(re.search(r"\.mlp\.experts\.3\.gate_proj$", name) for name in packed)

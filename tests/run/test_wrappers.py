"""A whole run on models with a tower: the text decoder is quantized, the tower kept."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import pico, tiny
from helpers.e2e import recipe, run
from helpers.sweep import ids

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.run import prepare

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
        fused = "model.language_model.layers.0.linear_attn.in_proj_ba"
        assert any(re.match(rule, fused) for rule in rules), "in 16 bit under the name that engines look for"


# What unsloth's dynamic 4-bit bases leave in 16 bit: the head, the tower and the projector, and a few linears of blocks.
SKIPPED = {
    "gemma3": ["lm_head", "model.vision_tower", "model.multi_modal_projector", "model.language_model.layers.1.mlp"],
    "qwen2_5_vl": ["lm_head", "model.visual", "model.language_model.layers.1.self_attn"],
    "mistral3": ["lm_head", "model.vision_tower", "model.multi_modal_projector", "layers.0.mlp.down_proj"],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "older"), [*((kind, False) for kind in SKIPPED), ("gemma3", True)])
def test_a_4_bit_base_whose_tower_was_skipped_runs_whole(project: Path, tmp_path: Path, kind: str, older: bool) -> None:
    """older: the list in config.json is an older transformers', whose wrappers had no outer `model`."""
    changes = wrapped(project, tmp_path, kind)
    options = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    pico.save_4bit(tmp_path / "base", tmp_path / "packed", llm_int8_skip_modules=SKIPPED[kind], **options)
    for file in (project / "base").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "packed")
    base = Checkpoint(tmp_path / "packed")
    towers = [n for n in base if re.search(r"vision_tower|visual|multi_modal_projector", n)]
    assert towers
    assert not [n for n in towers if "absmax" in n], "the tower is in 16 bit"
    assert [n for n in base if "nested_absmax" in n], "the language part is not"

    # PEFT's unmerged forward on the very base that bitsandbytes saved
    live = pico.live_4bit(pico.reload_4bit(base.path))
    live = peft.PeftModel.from_pretrained(live, tmp_path / "adapter").eval()
    expected = pico.logits(live, ids())
    if older:
        config = json.loads((base.path / "config.json").read_text())
        names = config["quantization_config"]["llm_int8_skip_modules"]
        config["quantization_config"]["llm_int8_skip_modules"] = [name.removeprefix("model.") for name in names]
        (base.path / "config.json").write_text(json.dumps(config))
    del changes["base.nf4"]
    outcome = run(project, tmp_path / "runs", changes | {"base.model": str(base.path), "merge.dtype": "float32"})
    assert outcome.ran[-1] == "report"
    merged = tmp_path / "runs" / "pico" / "merged"
    assert pico.relative(pico.logits(pico.reload(merged), ids()), expected) < 1e-5
    gptq = Checkpoint(tmp_path / "runs" / "pico" / "gptq")
    assert all(name in gptq for name in towers)
    config = json.loads((gptq.path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq"
    assert not {"llm_int8_skip_modules", "load_in_4bit"} & config.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "why"), [("bart", "attends to the output of an encoder"), ("electra", "reads in both directions")]
)
def test_what_text_cannot_calibrate_is_refused_before_the_work(
    project: Path, tmp_path: Path, kind: str, why: str
) -> None:
    made = tiny.model(kind)
    base = pico.save(made, tmp_path / "base", torch.bfloat16)
    for file in (project / "base").glob("tokenizer*"):
        shutil.copy(file, base)
    pico.train(made, tmp_path / "adapter", target_modules="all-linear")
    changes = {
        "base.model": str(base), "base.original": None, "adapter": str(tmp_path / "adapter"), "gates": [],
        "base.nf4": {"quant_type": "nf4", "double_quant": False}, "evaluate.variants": ["base", "adapter", "merged", "gptq"],
    }  # fmt: skip
    with pytest.raises(InputError, match=rf"base: \w+ cannot be quantized: .*{why}"):
        prepare.prepare(recipe(project, tmp_path / "runs", changes))

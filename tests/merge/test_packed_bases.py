"""4-bit checkpoints of each storage dtype, nested or not, partly 4-bit, in one file or many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from helpers import pico
from helpers.e2e import recipe

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.run import prepare

FP32 = 1e-5  # sums of 64 to 128 products in another order, through two blocks
SKIP = ["lm_head", "model.layers.0.mlp", "v_proj"]  # as in "dynamic 4-bit" repositories: what quantizes badly stays

BASES: dict[str, dict[str, Any]] = {
    "float16 storage": {"bnb_4bit_quant_storage": torch.float16, "bnb_4bit_use_double_quant": True},
    "float32 storage": {"bnb_4bit_quant_storage": torch.float32},
    "int8 storage": {"bnb_4bit_quant_storage": torch.int8},
    "fp4 in bfloat16": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    "dynamic": {"llm_int8_skip_modules": SKIP, "bnb_4bit_use_double_quant": True},
    "dynamic in bfloat16": {"llm_int8_skip_modules": SKIP, "bnb_4bit_quant_storage": torch.bfloat16},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.filterwarnings("ignore")
def test_prequantized(tmp_path: Path, options: dict[str, Any], shard: str) -> None:
    """The merge gives the logits of the live QLoRA model; each tensor says if it is 4-bit."""
    made = pico.model()
    source = pico.save(made, tmp_path / "source", torch.bfloat16)
    pico.quantize(source, **({"bnb_4bit_quant_type": "nf4"} | options)).save_pretrained(
        tmp_path / "base", max_shard_size=shard
    )
    assert (len(list((tmp_path / "base").glob("*.safetensors"))) > 1) == (shard != "5GB")
    pico.train(made, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "up_proj"])
    live = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    live = peft.PeftModel.from_pretrained(pico.live_4bit(live), tmp_path / "adapter").eval()
    plan, _, tested = pico.merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert tested.worst <= 1
    packed = {n for n, w in plan.base.weights.items() if w.kind == "packed"}
    assert len(packed) == sum(isinstance(m, Linear4bit) for m in live.modules())
    assert len(packed) == (14 if "llm_int8_skip_modules" not in options else 9)
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < FP32


def test_gguf_is_refused_with_advice(project: Path, tmp_path: Path) -> None:
    """A GGUF file, alone or in a directory: no adapter was trained on these numbers."""
    folder = tmp_path / "quants"
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"only GGUF weights \(model-Q4_K_M.gguf\): no adapter was trained on these"):
        Checkpoint(folder)
    with pytest.raises(InputError) as caught:
        prepare.prepare(recipe(project, Path("runs"), {"base.model": str(folder / "model-Q4_K_M.gguf")}))
    assert "model-Q4_K_M.gguf: a GGUF file: no adapter was trained on these" in str(caught.value)
    assert "bitsandbytes 4-bit or 16-bit checkpoint" in str(caught.value)

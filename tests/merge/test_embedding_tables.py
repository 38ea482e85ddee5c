"""Adapters on an embedding that the file holds in two tables (Molmo 2), against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import pico, tiny
from helpers.merging import FP32, ledger
from helpers.sweep import ids
from safetensors.torch import load_file

from requant.errors import InputError
from requant.evaluate import streamed, variants

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")
EMBEDDING = "model.language_model.embed_tokens"
TABLES = ("model.transformer.wte.embedding", "model.transformer.wte.new_embedding")
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["embed_tokens", "o_proj"]},
    "tokens of both tables": {"target_modules": ["o_proj"], "trainable_token_indices": {"embed_tokens": [5, 250, 300]}},
    "whole": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
def test_each_table_gets_its_rows(tmp_path: Path, options: dict[str, Any]) -> None:
    made = tiny.model("molmo2")
    base = pico.save(made, tmp_path / "base")
    live = pico.train(made, tmp_path / "adapter", **options)
    plan, result, tested = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert tested.worst <= 1
    ledger(plan, result)
    assert (plan.embedding_rows, plan.vocab_size) == (512, None)
    got, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base))
    assert got.keys() == before.keys()
    merged = peft.PeftModel.from_pretrained(pico.reload(base), tmp_path / "adapter").merge_and_unload()
    expected = merged.get_submodule(EMBEDDING).weight
    assert pico.relative(torch.cat([got[name] for name in TABLES]), expected) < FP32
    assert all(pico.relative(got[name], before[name]) > 10 * FP32 for name in TABLES)
    sources = variants.VariantSources(
        base=base, adapter=tmp_path / "adapter", merged=tmp_path / "out", gptq=base, plan=plan, sixteen_bit=True
    )
    walk = streamed.walk_of("adapter", sources, device=CPU, dtype=torch.float32)
    logits = streamed.StreamedModel(walk)(input_ids=ids()).logits
    assert pico.relative(logits, pico.logits(live, ids())) < FP32


def test_new_tokens_are_refused(tmp_path: Path) -> None:
    made = tiny.model("molmo2")
    base = pico.save(made, tmp_path / "base")
    pico.train(made, tmp_path / "adapter", target_modules=["o_proj"], modules_to_save=["embed_tokens"])
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    name = next(n for n in load_file(weights) if "embed_tokens" in n)
    pico.edit_tensors(weights, change={name: lambda t: torch.cat([t, t[:8]])})
    with pytest.raises(
        InputError,
        match=r"embed_tokens has 520 rows, the base's 512, which .* as .*wte.embedding 256, .*new_embedding 256",
    ):
        pico.merged(base, tmp_path / "adapter", tmp_path / "out")

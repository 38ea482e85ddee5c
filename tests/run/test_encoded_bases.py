"""Whole runs on bases in MXFP4 and FP8: what `check` says, and what all variants are.

Merged, `adapter` and `base` come from three decoders: ours when merging, transformers' when loading, ours block by block.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import e2e, encoded, pico
from safetensors.torch import load_file

from requant import recipe as recipes
from requant.errors import RecipeError
from requant.recipe.template import starter
from requant.run import evaluation_inputs, prepare, runner
from requant.run.check import forecast
from requant_eval.scoring.batches import BatchSize

pytestmark = pytest.mark.filterwarnings("ignore")
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SIZES: dict[str, Any] = {"vocab_size": e2e.VOCABULARY, "max_position_embeddings": 256}


def project(out: Path, kind: str, **changes: Any) -> Path:
    """base/ and adapter/ of one kind of base, with texts."""
    if kind == "mxfp4":
        made = pico.model("gpt_oss", num_local_experts=4, intermediate_size=64, head_dim=16, **SIZES, **changes)
        encoded.mxfp4_base(pico.save(made, out / "base", torch.bfloat16))
    else:
        config = {"fp8": encoded.BLOCKS, "fbgemm_fp8": encoded.ROWS, "experts": encoded.TENSORS}[kind]
        made = pico.model("qwen3_moe" if kind == "experts" else "llama", **SIZES)
        encoded.fp8(pico.save(made, out / "base", torch.bfloat16), config)
    experts = {"target_parameters": STACKS} if kind in ("mxfp4", "experts") else {}
    pico.train(made, out / "adapter", target_modules=["q_proj", "v_proj"], **experts)
    pico.edit_adapter(out / "adapter", base_model_name_or_path=str(out / "base"))
    e2e.make_tokenizer(out / "base")
    for name, documents in e2e.texts().items():
        e2e.write_rows(out / f"{name}.jsonl", [{"text": text} for text in documents])
    return out


def recipe(made: Path, out: Path, **changes: Any) -> recipes.Recipe:
    variants = ["base", "adapter", "merged", "gptq"]
    plain = {"output.dir": str(out), "base": {"model": "./base", "nf4": "none"}, "evaluate.variants": variants}
    return recipes.parse(json.dumps(e2e.changed(plain | {"heal": "off"} | changes)), directory=made)


@pytest.mark.parametrize(
    ("kind", "name"), [("mxfp4", "MXFP4"), ("fp8", "FP8"), ("fbgemm_fp8", "FP8"), ("experts", "FP8")]
)
def test_a_whole_run(tmp_path: Path, kind: str, name: str) -> None:
    """experts: LoRA on stacks, on a base of compressed-tensors that holds the experts one by one."""
    made = project(tmp_path / "p", kind)
    prepared = prepare.prepare(recipe(made, tmp_path))
    assert prepared.unloadable is None
    assert prepared.held == f"base in {name}, decoded as training held it"
    sources = evaluation_inputs.variant_sources(prepared, tmp_path / "nowhere")
    needs = forecast.forecast(prepared, sources, torch.device("cpu"), torch.float32, BatchSize(windows=2))
    assert [n.stage for n in needs] == ["merge", "quantize", "evaluate"], (
        "also of experts in one tensor, with an adapter"
    )
    with e2e.one_thread():
        result = runner.run(recipe(made, tmp_path))
    report = result.report
    assert report is not None
    facts = report["facts"]
    assert facts["merge"]["onto"] == f"{name} weights decoded to 16 bit or more"
    assert facts["merge"]["ledger"]["base"]["decoded+folded"] >= 4
    assert facts["cost"]["bytes"]["base"] == (made / "base" / "model.safetensors").stat().st_size
    for part in ("merged", "gptq"):
        config = json.loads((result.path / part / "config.json").read_text())
        assert config.get("quantization_config", {}).get("quant_method") == (None if part == "merged" else "gptq")
        held = load_file(next((result.path / part).glob("*.safetensors")))
        assert not [n for n in held if n.endswith(("_blocks", "_scale_inv", "_scale"))]
    section = next(s for s in report["sets"] if s["name"] == "in-domain")
    loss = {v["name"]: v["mean_nll"]["value"] for v in section["variants"]}
    assert loss["merged"] == pytest.approx(loss["adapter"], rel=1e-5)
    assert loss["base"] != pytest.approx(loss["adapter"], rel=1e-5)


@pytest.mark.parametrize("nf4", ["auto", {"quant_type": "nf4", "double_quant": True}])
def test_the_recipe_must_say_that_it_is_not_nf4(tmp_path: Path, nf4: Any) -> None:
    made = project(tmp_path / "p", "mxfp4")
    with pytest.raises(RecipeError, match=r"base\.nf4: .* but base is stored in MXFP4, which is decoded") as caught:
        prepare.prepare(recipe(made, tmp_path, base={"model": "./base", "nf4": nf4}))
    assert "write nf4: none" in str(caught.value)


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_the_starter_says_it(tmp_path: Path, kind: str) -> None:
    made = project(tmp_path / "p", kind)
    text = starter(made / "adapter", directory=made)
    assert (
        f"nf4: none                 # none | a section; none: {kind} on disk, decoded to 16 bit as in training" in text
    )
    assert recipes.parse(text, directory=made).base.nf4 == "none"

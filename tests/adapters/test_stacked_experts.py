"""Experts stored in one tensor (gpt-oss, Granite MoE, Llama 4): merged, single or in 16 bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import pico
from helpers.e2e import one_thread, recipe
from helpers.merging import FP32

from requant import deploy, quantize
from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.evaluate import variants
from requant.modeling import skeleton
from requant.numerics.grid import Grid
from requant.quantize import plan as layout
from requant.run import prepare

pytestmark = pytest.mark.filterwarnings("ignore")
# model_type: (changes of its config, what holds its experts)
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "gpt_oss": (
        {"num_local_experts": 4, "intermediate_size": 96, "head_dim": 16, "num_experts_per_tok": 2}, "mlp.experts"
    ),
    "granitemoe": ({"num_local_experts": 4, "intermediate_size": 96, "num_experts_per_tok": 2}, "block_sparse_moe.experts"),
    "llama4_text": (
        {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 96, "intermediate_size_mlp": 128,
         "head_dim": 16, "interleave_moe_layer_step": 1}, "feed_forward.experts",
    ),
}  # fmt: skip
BOTH = pytest.mark.parametrize("kind", KINDS)


def stacks(kind: str) -> list[str]:
    return [f"{KINDS[kind][1]}.{leaf}" for leaf in ("gate_up_proj", "down_proj")]


@BOTH
def test_an_adapter_on_them_is_merged(tmp_path: Path, kind: str) -> None:
    made = pico.model(kind, **KINDS[kind][0])
    base = pico.save(made, tmp_path / "base")
    plain = pico.logits(made)
    live = pico.train(made, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=stacks(kind))
    expected = pico.logits(live)
    assert pico.relative(plain, expected) > 100 * FP32
    pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), expected) < FP32


@pytest.mark.slow
@BOTH
def test_they_stay_in_16_bit_and_every_engine_is_told(tmp_path: Path, kind: str) -> None:
    """A rule for their container: without it vLLM loads them as quantized.

    Shown by tests/deploy/test_vllm.py.
    """
    source = pico.save(pico.model(kind, **KINDS[kind][0]), tmp_path / "model", torch.float16)
    pico.save_tokenizer(source)
    plan = pico.packed(source, tmp_path / "out", Grid(4, 32))
    containers = [f"model.layers.{i}.{KINDS[kind][1]}" for i in (0, 1)]
    assert list(plan.fused) == containers
    assert not any("experts." in name for name in plan.grids)
    rules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["dynamic"]
    assert rules == {"-:^" + name.replace(".", r"\.") + "$": {} for name in containers}
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    kept = [
        n for n in before if before[n].shape[0] == KINDS[kind][0]["num_local_experts"] and len(before[n].shape) == 3
    ]
    assert len(kept) == 4
    assert all(torch.equal(before.read(n), after.read(n)) for n in kept)
    with one_thread():
        done = deploy.verify(tmp_path / "out", source=source)
    assert done.ok, done.message()


@pytest.mark.slow
@BOTH
def test_transformers_reads_them_as_we_do(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("gptqmodel")
    source = pico.save(pico.model(kind, **KINDS[kind][0]), tmp_path / "model", torch.float16)
    plan = pico.packed(source, tmp_path / "out", Grid(4, 32))
    sources = variants.VariantSources.of_checkpoint(source, gptq=tmp_path / "out")
    ours = variants.load("gptq", sources, device=torch.device("cpu"), dtype=torch.float32)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map={"": "cpu"}, dtype=torch.float32,
        quantization_config=transformers.GPTQConfig(bits=4, backend="gptq_torch"),
    ).eval()  # fmt: skip
    assert sum(hasattr(m, "qweight") for m in loaded.modules()) == len(plan.grids)
    assert pico.relative(pico.logits(loaded), pico.logits(ours)) < FP32


@pytest.mark.slow
@BOTH
def test_check_plans_to_quantize_them_one_by_one(project: Path, tmp_path: Path, kind: str) -> None:
    made = pico.model(kind, **(KINDS[kind][0] | {"vocab_size": 300}))
    base = pico.save(made, tmp_path / "base", torch.bfloat16)
    for file in (project / "base").glob("tokenizer*"):
        shutil.copy(file, base)
    pico.train(made, tmp_path / "adapter")
    changes = {
        "base.model": str(base), "base.original": None, "adapter": str(tmp_path / "adapter"),
        "base.nf4": {"quant_type": "nf4", "double_quant": False}, "evaluate.variants": ["adapter", "merged", "gptq"],
        "quantize.experts": "quantize",
    }  # fmt: skip
    prepared = prepare.prepare(recipe(project, tmp_path / "runs", changes))
    assert not [w for w in prepared.warnings if "stacked expert weights stay in 16 bit" in w]
    single = {n for n in prepared.quantize.plan.grids if ".experts." in n}
    assert len(single) == 2 * KINDS[kind][0]["num_local_experts"] * 3, "two layers: gate, up and down of each expert"


def test_single_experts_that_a_checkpoint_holds_stacked_are_refused(tmp_path: Path) -> None:
    """A checkpoint written under transformers' own names has none of the names of the plan."""
    model = skeleton.build(pico.config("mixtral"))
    named = dict(pico.model("mixtral").named_parameters())
    with pytest.raises(InputError) as caught:
        layout.plan(named, model, quantize.Settings(grid=Grid(4, 32)), torch.float16, where=tmp_path)
    message = "model.layers.0.mlp.experts.0.gate_proj: its weight is not in the checkpoint under a name that transformers knows"
    assert message in str(caught.value)

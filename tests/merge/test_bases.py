"""Which modules of a 16-bit base were in 4 bits in training; the original; refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from helpers import pico
from helpers.e2e import edit_json, recipe, run
from helpers.merging import FP32
from safetensors.torch import load_file, save_file

from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError, StageError
from requant.evaluate import variants
from requant.merge.base_weights import Nf4Settings
from requant.numerics import nf4
from requant.run import prepare

pytestmark = pytest.mark.filterwarnings("ignore")
MOE = {"num_local_experts": 4, "intermediate_size": 48}


def made(tmp: Path, kind: str = "llama", **changes: Any) -> tuple[Path, Path, Any]:
    """(base, adapter on q_proj, live PEFT model on the 16-bit base)."""
    model = pico.model(kind, **changes)
    base = pico.save(model, tmp / "base", torch.bfloat16)
    return base, tmp / "adapter", pico.train(model, tmp / "adapter", target_modules=["q_proj"])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_versions_4_and_5_agree_on_dense_models(tmp_path: Path, kind: str) -> None:
    base = pico.save(pico.model(kind), tmp_path / "base", torch.bfloat16)
    target = {"gpt_neox": ["query_key_value"]}.get(kind, ["q_proj"])
    pico.train(pico.model(kind), tmp_path / "adapter", target_modules=target)
    kinds = []
    for version in (4, 5):
        settings = Nf4Settings(quant_type="nf4", double_quant=False, version=version)  # type: ignore[arg-type]
        plan, _ = prepare.plan_merge(base, peft_directory.load(tmp_path / "adapter"), settings, trust_remote_code=False)
        kinds.append({n: w.kind for n, w in plan.base.weights.items()})
    assert kinds[0] == kinds[1]
    assert "simulated" in kinds[0].values()


def test_version_4_quantized_single_experts(tmp_path: Path) -> None:
    """transformers 4 quantized each expert and the router; 5 keeps experts in one 16-bit stack."""
    base, adapter, _ = made(tmp_path, "mixtral", **MOE)
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    stored = Checkpoint(base).read(name)
    for version, kind in ((4, "simulated"), (5, "stored")):
        settings = Nf4Settings(quant_type="nf4", double_quant=False, version=version)  # type: ignore[arg-type]
        plan, _ = prepare.plan_merge(base, peft_directory.load(adapter), settings, trust_remote_code=False)
        assert plan.base.weights[name].kind == kind
        assert plan.base.weights["model.layers.0.block_sparse_moe.gate.weight"].kind == kind
        expected = nf4.round_trip(stored, "nf4", 64, double_quant=False) if version == 4 else stored
        assert torch.equal(plan.base.read(name), expected)


def sources(base: Path, adapter: Path, simulate: Nf4Settings) -> variants.VariantSources:
    return variants.VariantSources(base=base, adapter=adapter, merged=base, gptq=base, simulate=simulate)


def test_the_live_base_has_version_4s_selection(tmp_path: Path) -> None:
    base, adapter, _ = made(tmp_path)
    simulate = Nf4Settings(quant_type="nf4", double_quant=False, skip=("lm_head", "v_proj"), version=4)
    live = variants.load("base", sources(base, adapter, simulate), device=torch.device("cpu"), dtype=torch.float32)
    plan, _ = prepare.plan_merge(base, peft_directory.load(adapter), simulate, trust_remote_code=False)
    packed = {f"{n}.weight" for n, m in live.named_modules() if isinstance(m, Linear4bit)}
    assert packed == {n for n, w in plan.base.weights.items() if w.kind == "simulated"}
    assert len(packed) == 12


def test_a_live_base_that_5_cannot_make_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = made(tmp_path, "mixtral", **MOE)
    simulate = Nf4Settings(quant_type="nf4", double_quant=False, version=4)
    with pytest.raises(StageError) as caught:
        variants.load("base", sources(base, adapter, simulate), device=torch.device("cpu"), dtype=torch.float32)
    assert "transformers 4 quantized it, transformers 5 cannot" in str(caught.value)
    assert "The merge is not affected" in str(caught.value)


def pack_4bit(folder: Path) -> None:
    """All matrices of the blocks in 4 bits, under the names that transformers 4 saved."""
    import bitsandbytes.functional as bnb

    stored, packed = load_file(folder / "model.safetensors"), {}
    for name, tensor in stored.items():
        packed[name] = tensor
        if tensor.ndim == 2 and ".layers." in name:
            packed[name], state = bnb.quantize_4bit(tensor, quant_type="nf4")
            packed |= {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_json(folder / "config.json", quantization_config=settings)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in training", "on disk"])
def test_experts_in_4_bits_are_merged_and_measured_without_transformers(
    project: Path, tmp_path: Path, way: str
) -> None:
    """transformers 5 fuses experts before bitsandbytes: check says so, run refuses.

    The run is refused with streaming off.
    """
    base, adapter, _ = made(tmp_path, "mixtral", num_local_experts=4, intermediate_size=64, vocab_size=300)
    for file in (project / "base").glob("tokenizer*"):
        shutil.copy(file, base)
    changes: dict[str, Any] = {"base.model": str(base), "base.original": None, "adapter": str(adapter)}
    changes |= {"evaluate.variants": ["base", "adapter", "merged", "gptq"]}
    if way == "on disk":
        pack_4bit(base)
    else:
        changes |= {"base.nf4": {"quant_type": "nf4", "double_quant": False, "transformers": 4}}
    # two layers of 4 experts with 3 matrices, and 2 routers
    said = "the base holds 26 modules in 4 bits that transformers 5 cannot, e.g. model.layers.0.mlp.experts.0.down_proj"
    prepared = prepare.prepare(recipe(project, tmp_path / "runs", changes))
    assert any(said in warning for warning in prepared.warnings)
    with pytest.raises(InputError, match=r"set evaluate\.stream to auto, or stop after requant quantize") as caught:
        run(project, tmp_path / "runs", changes | {"evaluate.stream": "never"})
    assert said in str(caught.value)
    assert not (tmp_path / "runs").exists()
    report = run(project, tmp_path / "runs", changes).report
    for s in report["sets"]:
        steps = {(e["from"], e["to"]): e["delta"]["value"] for e in s["edges"]}
        assert abs(steps["adapter", "merged"]) < FP32, "PEFT unmerged on the decoded base, block by block"
        assert abs(steps["base", "adapter"]) > 10 * FP32


def test_stacked_experts_of_transformers_5_on_a_base_of_4_are_refused(project: Path, tmp_path: Path) -> None:
    """One of the two is not what the recipe says it is."""
    sizes = {"num_local_experts": 4, "intermediate_size": 64, "vocab_size": 300}
    base = pico.save(pico.model("mixtral", **sizes), tmp_path / "base", torch.bfloat16)
    for file in (project / "base").glob("tokenizer*"):
        shutil.copy(file, base)
    stacks = ["mlp.experts.gate_up_proj"]
    pico.train(
        pico.model("mixtral", **sizes), tmp_path / "adapter", target_modules=["q_proj"], target_parameters=stacks
    )
    changes = {
        "base.model": str(base), "base.original": None, "adapter": str(tmp_path / "adapter"),
        "base.nf4": {"quant_type": "nf4", "double_quant": False, "transformers": 4},
        "evaluate.variants": ["base", "adapter", "merged", "gptq"],
    }  # fmt: skip
    with pytest.raises(InputError, match=r"stacked experts are of transformers 5: base\.nf4\.transformers is wrong"):
        run(project, tmp_path / "runs", changes)


def test_onto_the_original_when_both_bases_are_known(tmp_path: Path) -> None:
    """The 16-bit model with the delta gives PEFT's unmerged forward on it.

    Not the one on the dequantized model.
    """
    base, adapter, _ = made(tmp_path)
    live = peft.PeftModel.from_pretrained(pico.reload(base), adapter).eval()
    packed = pico.save_4bit(base, tmp_path / "packed", bnb_4bit_quant_type="nf4")
    pico.merged(packed, adapter, tmp_path / "onto-packed")
    pico.merged(base, adapter, tmp_path / "onto-original")
    expected = pico.logits(live)
    assert pico.relative(pico.logits(pico.reload(tmp_path / "onto-original")), expected) < FP32
    assert pico.relative(pico.logits(pico.reload(tmp_path / "onto-packed")), expected) > 100 * FP32


def test_dora_onto_the_original_takes_the_originals_norms(tmp_path: Path) -> None:
    model = pico.model()
    base = pico.save(model, tmp_path / "base")
    live = pico.train(model, tmp_path / "adapter", use_dora=True)
    pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), pico.logits(live)) < FP32


# What is refused ---------------------------------------------------------------------------------------------------


def refused(base: Path, adapter: Path) -> str:
    with pytest.raises(InputError) as caught:
        prepare.plan_merge(base, peft_directory.load(adapter), None, trust_remote_code=False)
    return str(caught.value)


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "quanto"])
def test_other_quantized_formats(tmp_path: Path, method: str) -> None:
    base, adapter, _ = made(tmp_path)
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (base / "config.json").write_text(json.dumps(config))
    message = refused(base, adapter)
    assert f"the base is quantized with {method}" in message
    assert "Use the 16-bit model that it was made from" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("llama9", "config.json: transformers cannot read it: "),
        (None, "config.json: transformers cannot read it: "),
        ("vit", "model_type 'vit' has no class that generates text in transformers"),
    ],
)
def test_a_model_that_transformers_does_not_know(tmp_path: Path, model_type: str | None, says: str) -> None:
    base, adapter, _ = made(tmp_path)
    edit_json(base / "config.json", model_type=model_type)
    assert says in refused(base, adapter)


def test_a_name_that_is_neither_here_nor_on_the_hub(project: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        prepare.prepare(recipe(project, tmp_path, {"base.model": "nobody/nothing-of-this-name"}))
    message = str(caught.value)
    assert message.startswith(
        "recipe.yaml:1: base.model: nobody/nothing-of-this-name: no such local directory, and the hub does not give it: "
    )
    assert message.endswith("Check the name, HF_TOKEN for gated models, or begin a local path with ./")


def test_one_tensor_replaced_under_two_names(tmp_path: Path) -> None:
    """Both spellings are the base's norm: which values count is not in the file."""
    base, adapter, _ = made(tmp_path)
    pico.train(pico.model(), adapter, target_modules=["q_proj"], modules_to_save=["norm"])
    file = adapter / peft_directory.WEIGHTS
    key = next(k for k in load_file(file) if k.endswith("model.norm.weight"))
    pico.edit_tensors(file, add={key.replace("model.norm", "model.language_model.norm"): load_file(file)[key] + 1})
    assert "model.norm.weight is replaced twice: which tensor counts?" in refused(base, adapter)


def test_gguf(tmp_path: Path) -> None:
    base, adapter, _ = made(tmp_path)
    (base / "model.safetensors").rename(base / "model-Q4_K_M.gguf")
    message = refused(base, adapter)
    assert "only GGUF weights (model-Q4_K_M.gguf): no adapter was trained on these" in message
    assert "Use the 16-bit or bitsandbytes model that the adapter names as its base" in message


def test_a_peft_that_leaves_tensors_out_is_noticed(tmp_path: Path) -> None:
    """PEFT skips tensors that it does not find; the reference would lack them silently."""
    from requant.evaluate import peft_runtime

    base, adapter, _ = made(tmp_path)
    plan, _ = prepare.plan_merge(base, peft_directory.load(adapter), None, trust_remote_code=False)
    smaller = pico.model(num_hidden_layers=1)
    with pytest.raises(StageError, match=r"PEFT .* does not load 2 tensors, e\.g\..*layers\.1"):
        peft_runtime.attach(smaller, plan)
    assert isinstance(peft_runtime.attach(pico.model(), plan), peft.PeftModel)

"""`requant.merge.base_checkpoint`: bases in MXFP4 and FP8, decoded and merged onto."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import encoded, pico
from helpers.merging import FP32, ledger
from safetensors.torch import load_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from requant.errors import InputError
from requant.merge.base_checkpoint import FORMATS, DecodedCheckpoint, open_base_checkpoint
from requant.recipe import template

pytestmark = pytest.mark.filterwarnings("ignore")
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def fp8_base(tmp: Path, config: dict[str, Any] = encoded.BLOCKS, kind: str = "llama") -> Path:
    return encoded.fp8(pico.save(pico.model(kind), tmp / "base", torch.bfloat16), config)


def gpt_oss(tmp: Path) -> Path:
    made = pico.model("gpt_oss", num_local_experts=4, intermediate_size=96, head_dim=16)
    return encoded.mxfp4_base(pico.save(made, tmp / "base", torch.bfloat16))


def live(base: Path) -> Any:
    """The base as transformers decodes it, in fp32."""
    config = transformers.AutoConfig.from_pretrained(base)
    config.quantization_config["dequantize"] = True
    made = transformers.AutoModelForCausalLM.from_pretrained(
        str(base), config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    return made.float().eval()  # what is not quantized stays in the file's dtype


def check_merge(tmp: Path, base: Path, **lora: Any) -> None:
    """The merge has the logits of PEFT on transformers' own decoded base; nothing of the quantization is left."""
    tuned = pico.train(live(base), tmp / "adapter", **lora)
    plan, result, tested = pico.merged(base, tmp / "adapter", tmp / "out")
    assert tested.worst <= 1
    ledger(plan, result)
    assert pico.relative(pico.logits(pico.reload(tmp / "out")), pico.logits(tuned)) < FP32
    again = pickle.loads(pickle.dumps(plan)).base  # as it goes to the other processes of a run
    for name in again.checkpoint.encoded:
        assert torch.equal(again.read(name), plan.base.read(name))
    assert "quantization_config" not in json.loads((tmp / "out" / "config.json").read_text())
    held = load_file(tmp / "out" / "model.safetensors")
    assert not [n for n in held if n.endswith(("_scale_inv", "_scales", "_blocks", "_scale"))]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_fp8_in_blocks(tmp_path: Path, kind: str) -> None:
    base = fp8_base(tmp_path, kind=kind)
    opened, stored = open_base_checkpoint(base), load_file(base / "model.safetensors")
    assert isinstance(opened, DecodedCheckpoint)
    for name in (n for n in stored if f"{n}_scale_inv" in stored):
        theirs = Fp8Dequantize(None)._dequantize_one(stored[name], stored[f"{name}_scale_inv"], torch.float32)
        assert torch.equal(opened.read(name), theirs)
        assert opened[name].dtype == torch.float32
    check_merge(tmp_path, base)


def test_experts_of_an_fp8_base_that_are_stored_one_by_one(tmp_path: Path) -> None:
    check_merge(tmp_path, fp8_base(tmp_path, kind="qwen3_moe"), target_modules=["q_proj"], target_parameters=STACKS)


@pytest.mark.parametrize("config", [encoded.ROWS, encoded.TENSORS], ids=["fbgemm", "compressed-tensors"])
def test_fp8_with_a_scale_a_row_or_a_tensor(tmp_path: Path, config: dict[str, Any]) -> None:
    """transformers needs other packages for these: codes times scales, as torch converts them."""
    base = fp8_base(tmp_path, config)
    opened, stored = open_base_checkpoint(base), load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(opened.read(name), stored[name].float() * stored[f"{name}_scale"])
    assert not [n for n in opened if n.endswith(("_scale", "input_scale"))]
    pico.train(pico.model(), tmp_path / "adapter")
    plan, result, _ = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    ledger(plan, result)
    assert result.ledger["base"]["dropped"] == 2 * 7 * 2
    assert result.onto == "FP8 weights decoded to 16 bit or more"


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    """E8M0, one byte each, as bases with `scale_fmt: ue8m0` hold them: the weights of the same scales in fp32."""
    base = fp8_base(tmp_path, encoded.BLOCKS | {"scale_fmt": "ue8m0"})
    stored = load_file(base / "model.safetensors")
    scales = {n: lambda t: t.log2().ceil().exp2() for n in stored if n.endswith("_scale_inv")}
    pico.edit_tensors(base / "model.safetensors", change=scales)
    opened = open_base_checkpoint(base)
    plain = {n: opened.read(n) for n in opened}
    pico.edit_tensors(base / "model.safetensors", change=dict.fromkeys(scales, lambda t: t.to(torch.float8_e8m0fnu)))
    assert load_file(base / "model.safetensors")[next(iter(scales))].dtype == torch.float8_e8m0fnu
    opened = open_base_checkpoint(base)
    assert set(opened) == set(plain)
    assert all(torch.equal(opened.read(n), value) for n, value in plain.items())
    pico.train(pico.model(), tmp_path / "adapter")
    pico.merged(base, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_counted_by_file_and_tensor(tmp_path: Path, bad: float) -> None:
    base = fp8_base(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    pico.edit_tensors(
        base / "model.safetensors",
        change={f"{name}_scale_inv": lambda t: t.index_fill(0, t.new_tensor([1]).long(), bad)},
    )
    opened = open_base_checkpoint(base)
    assert isinstance(opened, DecodedCheckpoint)
    says = rf"model.safetensors: {name}_scale_inv: 2 of 8 scales are NaN or infinity"
    for read in (opened.check_scales, lambda: opened.read(name)):
        with pytest.raises(InputError, match=says):
            read()


def test_exponents_that_stand_for_nan(tmp_path: Path) -> None:
    base = gpt_oss(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    pico.edit_tensors(base / "model.safetensors", change={name: lambda t: t.index_fill(0, torch.tensor([2]), 255)})
    opened = open_base_checkpoint(base)
    assert isinstance(opened, DecodedCheckpoint)
    with pytest.raises(InputError, match=rf"{name}: \d+ of \d+ scales are NaN or infinity"):
        opened.check_scales()


def test_mxfp4(tmp_path: Path) -> None:
    base = gpt_oss(tmp_path)
    opened, stored = open_base_checkpoint(base), load_file(base / "model.safetensors")
    assert isinstance(opened, DecodedCheckpoint)
    for name in opened.encoded:
        theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(opened.read(name), theirs)
        assert opened[name].shape == theirs.shape
    check_merge(tmp_path, base, target_modules=["q_proj"], target_parameters=STACKS)


def test_layers_past_the_last_are_decoded_too(tmp_path: Path) -> None:
    """DeepSeek's and GLM's prediction layers, which only servers run: 16 bit in the output, without scales."""
    base = encoded.fp8(pico.save(pico.model(num_hidden_layers=3), tmp_path / "base", torch.bfloat16))
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 2}))
    pico.train(pico.model(), tmp_path / "adapter")
    plan, _, _ = pico.merged(base, tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    assert plan.carried == {"model.layers.2": 9}
    name = "model.layers.2.mlp.up_proj.weight"
    held = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert held.dtype == torch.bfloat16
    assert torch.equal(held, open_base_checkpoint(base).read(name).to(torch.bfloat16))


def test_the_starter_knows_the_same_formats() -> None:
    assert set(template.DECODED) == set(FORMATS)


@pytest.mark.parametrize(
    ("method", "names", "says"),
    [
        ("gptq", [], "the base is quantized with gptq; adapters are merged onto 16-bit bases"),
        (["fp8"], [], "the base is quantized with"),
        ("fp8", [], "says FP8, but no tensor is of 8-bit floats"),
        ("mxfp4", [], "says MXFP4, but no tensor is named ..._blocks"),
    ],
)
def test_other_formats(tmp_path: Path, method: Any, names: list[str], says: str) -> None:
    base = encoded.encode(pico.save(pico.model(), tmp_path / "base"), {"quant_method": method}, lambda *_: None)
    with pytest.raises(InputError, match=says):
        open_base_checkpoint(base)


Q = "model.layers.0.self_attn.q_proj.weight"
G = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("kind", "edit", "says"),
    [
        ("fp8", {"drop": [f"{Q}_scale_inv"]}, f"{Q} is torch.float8_e4m3fn without a scale"),
        ("fp8", {"change": {f"{Q}_scale_inv": lambda t: t[:1]}}, f"{Q}: scales .* nor one a block of 32 x 32"),
        ("fp8", {"change": {f"{Q}_scale_inv": lambda t: t.int()}}, "is torch.int32, expected float32 or bfloat16"),
        ("fp8", {"change": {Q: lambda t: t.float().to(torch.int8)}}, "is no weight of 8-bit floats"),
        ("mxfp4", {"drop": [f"{G}_scales"]}, f"{G}_blocks stands alone"),
        ("mxfp4", {"drop": [f"{G}_blocks"]}, f"{G}_scales stands alone"),
        ("mxfp4", {"add": {G: torch.zeros(4, 64, 192)}}, f"{G} is stored in 16 bit beside {G}_blocks"),
        ("mxfp4", {"change": {f"{G}_scales": lambda t: t[:, :1]}}, f"{G}_blocks .*expected .experts, out, groups, 16."),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, kind: str, edit: dict[str, Any], says: str) -> None:
    base = fp8_base(tmp_path) if kind == "fp8" else gpt_oss(tmp_path)
    pico.edit_tensors(base / "model.safetensors", **edit)
    with pytest.raises(InputError, match=says):
        open_base_checkpoint(base)


def test_a_wrong_block_size(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"weight_block_size is \[0, 32\], expected two whole numbers"):
        open_base_checkpoint(fp8_base(tmp_path, encoded.BLOCKS | {"weight_block_size": [0, 32]}))


def test_rotated_weights_are_refused(tmp_path: Path) -> None:
    rotation = {"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}
    base = fp8_base(tmp_path, encoded.TENSORS | {"transform_config": rotation})
    with pytest.raises(InputError, match="has a transform_config: its weights are rotated"):
        open_base_checkpoint(base)


def test_scales_of_more_matrices_than_the_weight_has(tmp_path: Path) -> None:
    base = fp8_base(tmp_path)
    pico.edit_tensors(base / "model.safetensors", change={f"{Q}_scale_inv": lambda t: torch.stack([t, t])})
    with pytest.raises(InputError, match=r"q_proj.weight: scales \[2, 2, 2\] of a weight \[64, 64\] are neither"):
        open_base_checkpoint(base)


def test_settings_in_text_config_are_found(tmp_path: Path) -> None:
    """Models with towers keep them there, and transformers looks for them there."""
    base = fp8_base(tmp_path)
    settings = json.loads((base / "config.json").read_text())
    settings["text_config"] = {"quantization_config": settings.pop("quantization_config")}
    (base / "config.json").write_text(json.dumps(settings))
    opened = open_base_checkpoint(base)
    assert isinstance(opened, DecodedCheckpoint)
    assert opened.format_name == "FP8"
    assert opened.config["text_config"] == {}
    assert "quantization_config" in settings["text_config"]

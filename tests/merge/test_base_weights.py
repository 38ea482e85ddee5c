"""`requant.merge.base_weights`: a base's tensors by kind; what bitsandbytes would quantize."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from helpers import pico, tiny
from helpers.sweep import decoded_by_bitsandbytes

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.evaluate.variant_weights import open_base
from requant.merge.base_weights import BaseWeights, Nf4Settings
from requant.modeling import skeleton
from requant.numerics import nf4

NAME = "model.layers.0.mlp.down_proj.weight"


def decoded(base: BaseWeights) -> dict[str, torch.Tensor]:
    return {name: base.read(name) for name in base.weights}


@pytest.mark.filterwarnings("ignore")
def test_weights_of_a_packed_base(tmp_path: Path) -> None:
    """Names and shapes of the 16-bit checkpoint, values of bitsandbytes' own decoder."""
    source = pico.save(pico.model(), tmp_path / "source", torch.bfloat16)
    path = pico.save_4bit(source, tmp_path / "base", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = BaseWeights(Checkpoint(path))
    original = Checkpoint(source)
    read = decoded(base)
    assert {n: tuple(t.shape) for n, t in read.items()} == {n: original[n].shape for n in original}
    assert list(read) == [n for n in Checkpoint(path) if n not in base.auxiliary]
    live = pico.quantize(source, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    for name, module in live.named_modules():
        if isinstance(module, Linear4bit):
            module.weight.quant_state.dtype = torch.float32
            expected = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(read[f"{name}.weight"], expected), name


@pytest.mark.filterwarnings("ignore")
def test_parts_may_lie_in_different_shards(tmp_path: Path) -> None:
    source = pico.save(pico.model(), tmp_path / "source", torch.bfloat16)
    pico.quantize(source, bnb_4bit_quant_type="nf4").save_pretrained(tmp_path / "one")
    pico.quantize(source, bnb_4bit_quant_type="nf4").save_pretrained(tmp_path / "many", max_shard_size="6KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 4
    one, many = (decoded(BaseWeights(Checkpoint(tmp_path / n))) for n in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[n], many[n]) for n in one)


def test_a_16_bit_base_is_passed_through(tmp_path: Path) -> None:
    path = pico.save(pico.model(), tmp_path / "base", torch.bfloat16)
    checkpoint = Checkpoint(path)
    base = BaseWeights(checkpoint)
    assert not base.packed
    assert not base.auxiliary
    for name, tensor in decoded(base).items():
        assert torch.equal(tensor, checkpoint.read(name))
        assert tensor.dtype == torch.bfloat16


def test_simulated_weights_are_cast_to_the_load_dtype_first(tmp_path: Path) -> None:
    """Training saw bfloat16 weights rounded to NF4, whatever the file's dtype.

    Other weights in bfloat16.
    """
    path = pico.save(pico.model(), tmp_path / "base", torch.float32)
    checkpoint = Checkpoint(path)
    base = BaseWeights(
        checkpoint, simulate=Nf4Settings(quant_type="nf4", double_quant=False), quantized=frozenset([NAME])
    )
    expected = nf4.round_trip(checkpoint.read(NAME).bfloat16(), "nf4", 64, double_quant=False)
    assert torch.equal(base.read(NAME), expected)
    norm = "model.norm.weight"
    assert torch.equal(base.read(norm), checkpoint.read(norm).bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "opt", "gpt_neox", "gpt2", "gemma2", "falcon", "qwen2_moe", "mixtral"]
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("skip", [(), ("lm_head", "v_proj"), ("layers.0",)])
@pytest.mark.filterwarnings("ignore")
def test_quantizable_modules_are_those_of_transformers(
    tmp_path: Path, kind: str, tied: bool, skip: tuple[str, ...]
) -> None:
    """The real replacement, on the meta device, is the oracle."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.auto import AutoHfQuantizer

    config: Any = pico.model(kind, tie_word_embeddings=tied).config
    skeleton_model = skeleton.build(config)
    ours = skeleton.quantizable(skeleton_model, skip)
    with torch.device("meta"):
        live = transformers.AutoModelForCausalLM.from_config(config)
    live.tie_weights()
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(skip) or None)
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    kept = quantizer.get_modules_to_not_convert(live, settings.llm_int8_skip_modules, live._keep_in_fp32_modules)
    live = replace_with_bnb_linear(live, modules_to_not_convert=kept, quantization_config=settings)
    assert ours == {name for name, module in live.named_modules() if isinstance(module, Linear4bit)}
    assert ours or skip or kind == "falcon", "Falcon's Linear is a class of its own, which bitsandbytes passes over"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loaded", ["bfloat16", "float16"])
def test_what_a_class_loads_in_fp32_is_quantized_from_there(tmp_path: Path, loaded: Any) -> None:
    """HY 4 keeps the indexer's `weights_proj` in fp32, and bitsandbytes decodes to the dtype that it quantized."""
    source = pico.save(tiny.model("hy_v4"), tmp_path / "source", torch.bfloat16)
    live = pico.quantize(
        source, getattr(torch, loaded), bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    simulate = Nf4Settings(quant_type="nf4", double_quant=False, load_dtype=loaded, compute_dtype="float32")
    model = skeleton.open_model(source)
    base = open_base(Checkpoint(source), model, simulate)
    names = skeleton.tensor_names(model, base.checkpoint)
    fp32 = []
    for name, module in live.named_modules():
        if isinstance(module, Linear4bit):
            expected = decoded_by_bitsandbytes(module.weight)
            stored = names[f"{name}.weight"]
            assert torch.equal(base.read(stored, as_trained=True).float(), expected), name
            fp32 += [stored] if module.weight.quant_state.dtype == torch.float32 else []
    assert {name.rpartition("indexer.")[2] for name in fp32} == {"weights_proj.weight"}


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        ("vision_tower", r"model\.vision_tower\."),
        ("language_model.layers.1", r".*language_model\.layers\.1\."),
        ("q_proj", r".*\.q_proj$"),
        ("layers.1.mlp.up_proj", "no module: a part of its end is not its name"),
    ],
)
def test_transformers_4_skipped_a_module_by_any_part_of_its_name(skip: str, kept: str) -> None:
    made = skeleton.build(tiny.config("gemma3"))
    every, rest = (skeleton.quantizable(made, names, version=4) for names in (("lm_head",), ("lm_head", skip)))
    assert every - rest == {name for name in every if re.match(kept, name)}


@pytest.mark.parametrize(("loaded", "compute"), [("bfloat16", "bfloat16"), ("float16", "bfloat16"), ("float32", None)])
@pytest.mark.filterwarnings("ignore")
def test_what_training_multiplied_by(tmp_path: Path, loaded: Any, compute: str | None) -> None:
    """bitsandbytes decodes to the dtype that was quantized and casts to the compute dtype, which is float32 unless set."""
    source = pico.save(pico.model(), tmp_path / "source", getattr(torch, loaded))
    named = {} if compute is None else {"bnb_4bit_compute_dtype": getattr(torch, compute)}
    live = pico.quantize(source, getattr(torch, loaded), bnb_4bit_quant_type="nf4", **named)
    live.save_pretrained(tmp_path / "base")
    simulate = Nf4Settings(quant_type="nf4", double_quant=False, load_dtype=loaded, compute_dtype=compute)
    on_the_fly = BaseWeights(Checkpoint(source), simulate=simulate, quantized=frozenset([NAME]))
    packed = BaseWeights(Checkpoint(tmp_path / "base"))
    module = live.get_submodule(NAME.removesuffix(".weight"))
    assert str(module.weight.quant_state.dtype).endswith(loaded)
    seen = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).to(module.compute_dtype).float()
    for base in (packed, on_the_fly):
        assert torch.equal(base.read(NAME, as_trained=True), seen)
        assert torch.equal(base.read(NAME), seen) == (loaded == "float32")


@pytest.mark.filterwarnings("ignore")
def test_a_compute_dtype_that_is_none_is_refused(tmp_path: Path) -> None:
    source = pico.save(pico.model(), tmp_path / "source", torch.bfloat16)
    path = pico.save_4bit(source, tmp_path / "base", bnb_4bit_quant_type="nf4")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_compute_dtype"] = "int4"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config.json: bnb_4bit_compute_dtype is 'int4', expected one of float16"):
        BaseWeights(Checkpoint(path))

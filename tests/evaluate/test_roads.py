"""Roads: each is its own library's model, with the size of the file that the library saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import encoded, pico
from torch import nn

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError, StageError
from requant.evaluate import roads
from requant.evaluate.roads import RoadLoader
from requant.evaluate.variant_sources import VariantSources
from requant.merge.base_weights import Nf4Settings
from requant.quantize import gptqmodel_engine

CPU = torch.device("cpu")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit base, the same in 4 bits, an adapter on all linears, and the merge onto the 4-bit one."""
    tmp = tmp_path_factory.mktemp("roads")
    pico.save(pico.model(), tmp / "half", torch.bfloat16)
    pico.save_4bit(tmp / "half", tmp / "packed", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    pico.train(pico.model(), tmp / "adapter", target_modules=ALL, scale=0.1)
    pico.merged(tmp / "packed", tmp / "adapter", tmp / "merged", dtype="bfloat16")
    return tmp


def sources(built: Path, base: str = "packed", **changes: Any) -> VariantSources:
    return VariantSources(
        base=built / base, adapter=built / "adapter", merged=built / "merged", gptq=built / "merged", **changes
    )


def loaded(name: str, of: VariantSources, tmp_path: Path) -> tuple[Any, roads.RoadFacts]:
    """A road's model in fp32, and what is told of it."""
    file = tmp_path / "facts.json"
    model = RoadLoader({name: file})(name, of, device=CPU, dtype=torch.float32)
    return model, roads.read_facts(file)


def in_file(model: Any, out: Path) -> tuple[int, int]:
    """(bytes of the tensors that the library saves, of those of 16-bit values)."""
    model.save_pretrained(out, save_original_format=False)  # else it fails on what it loaded in 4 bits
    infos = list(Checkpoint(out).values())
    return sum(i.nbytes for i in infos), sum(i.nbytes for i in infos if i.dtype == torch.bfloat16)


def merged_by_peft(base: Any, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()


HELD: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "in its files": ("packed", {}, {}, "nf4, double quantization; as the base is stored"),
    "as training quantized it": (
        "half",
        {"simulate": Nf4Settings(quant_type="fp4", double_quant=True)},
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16},
        "fp4, double quantization; as training had it",
    ),
    "by transformers' defaults": (
        "half",
        {"sixteen_bit": True},
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        "nf4, no double quantization; transformers' defaults beside nf4: training did not quantize the base",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("held", HELD)
def test_a_merge_into_4_bits_is_pefts(held: str, built: Path, tmp_path: Path) -> None:
    base, changes, options, words = HELD[held]
    quantized = pico.quantize(built / base, **options) if options else pico.reload_4bit(built / base)
    theirs = merged_by_peft(quantized, built / "adapter")
    whole, plain = in_file(theirs, tmp_path / "saved")
    ours, facts = loaded("nf4-merge", sources(built, base, **changes), tmp_path)
    assert pico.relative(pico.logits(ours), pico.logits(pico.live_4bit(theirs))) < 1e-5
    assert (facts["bytes"], facts["unquantized"]) == (whole, plain)
    assert facts["settings"] == words
    assert facts["by"].startswith(f"peft {peft.__version__}, bitsandbytes ")


@pytest.mark.slow
def test_the_merge_into_4_bits_is_no_unmerged_adapter(built: Path, tmp_path: Path) -> None:
    ours, _ = loaded("nf4-merge", sources(built), tmp_path)
    base = pico.live_4bit(pico.reload_4bit(built / "packed"))
    unmerged = peft.PeftModel.from_pretrained(base, str(built / "adapter")).eval()
    assert pico.relative(pico.logits(ours), pico.logits(unmerged)) > 1e-3


@pytest.mark.slow
def test_the_merged_model_in_4_bits_is_bitsandbytes(built: Path, tmp_path: Path) -> None:
    theirs = pico.quantize(
        built / "merged", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    whole, plain = in_file(theirs, tmp_path / "saved")
    ours, facts = loaded("nf4-again", sources(built), tmp_path)
    assert pico.relative(pico.logits(ours), pico.logits(pico.live_4bit(theirs))) < 1e-5
    assert (facts["bytes"], facts["unquantized"]) == (whole, plain)


@pytest.mark.slow
def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    pico.save(pico.model(tie_word_embeddings=True), tmp_path / "half", torch.bfloat16)
    model = pico.quantize(tmp_path / "half", bnb_4bit_quant_type="nf4")
    assert roads.saved_bytes(model) == in_file(model, tmp_path / "saved")


@pytest.mark.slow
def test_experts_in_one_tensor_stay_unquantized_and_are_counted_so(tmp_path: Path) -> None:
    pico.save(pico.model("qwen3_moe"), tmp_path / "half", torch.bfloat16)
    model = pico.quantize(tmp_path / "half", bnb_4bit_quant_type="nf4")
    whole, plain = roads.saved_bytes(model)
    experts = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    assert experts
    assert experts < plain < whole
    assert (whole, plain) == in_file(model, tmp_path / "saved")


@pytest.mark.slow
def test_an_adapter_that_peft_does_not_merge_into_4_bits(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise ValueError("not this kind")

    monkeypatch.setattr(peft.tuners.lora.bnb.Linear4bit, "merge", refuse)
    with pytest.raises(StageError, match="PEFT cannot merge it into 4 bits: ValueError: not this kind"):
        loaded("nf4-merge", sources(built), tmp_path)


def test_what_cannot_be_merged_into_4_bits_is_known_from_headers(built: Path, tmp_path: Path) -> None:
    pico.save(pico.model(), tmp_path / "fp8", torch.bfloat16)

    def code(name: str, value: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not name.endswith("_proj.weight"):
            return None
        codes, scale = encoded.fp8_codes(value, (32, 32))
        return {name: codes, f"{name}_scale_inv": scale}

    encoded.encode(tmp_path / "fp8", encoded.BLOCKS, code)
    of = VariantSources(base=tmp_path / "fp8", adapter=built, merged=built, gptq=built, sixteen_bit=True)
    assert roads.unmeasurable("nf4-merge", of) == "the base is in FP8: bitsandbytes does not hold it in 4 bits"
    assert roads.unmeasurable("nf4-again", of) is None
    assert roads.unmeasurable("nf4-merge", sources(built)) is None
    unloadable = sources(built, live=False)
    assert "transformers 5 cannot hold the base" in str(roads.unmeasurable("nf4-merge", unloadable))


@pytest.mark.parametrize("damage", ["{}", '{"by": "x"}', "no JSON"])
def test_damaged_facts_are_not_taken(damage: str, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(damage)
    with pytest.raises((ValueError, InputError)):
        roads.read_facts(tmp_path / "facts.json")


@pytest.mark.slow
def test_gptqmodels_own_checkpoint_is_scored_as_it_decodes_it(built: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel import BACKEND, GPTQModel

    out = tmp_path / "made"
    out.mkdir()
    pico.save_tokenizer(built / "merged")  # it insists on one
    gptqmodel_engine.quantize_by_defaults(
        built / "merged", out, pico.ids(8, 32, seed=3), bits=4, group_size=32, dtype=torch.bfloat16, device=CPU
    )
    assert not (out / ".work").exists()
    assert str(tmp_path) not in (out / "config.json").read_text() + (out / "quantize_config.json").read_text()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    theirs = GPTQModel.load(str(out), device="cpu", backend=BACKEND.TORCH, dtype=torch.bfloat16).model
    for name, module in list(theirs.named_modules()):
        if hasattr(module, "dequantize_weight"):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.data = module.dequantize_weight().T.float().contiguous()
            owner, _, leaf = name.rpartition(".")
            setattr(theirs.get_submodule(owner), leaf, plain)
    ours = RoadLoader({})("gptqmodel", sources(built, gptqmodel=out), device=CPU, dtype=torch.float32)
    assert pico.relative(pico.logits(ours), pico.logits(theirs.float())) < 1e-2

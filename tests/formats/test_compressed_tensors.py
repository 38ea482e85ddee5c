"""`requant.formats.compressed_tensors`, held against the library of that name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.apply import apply_quantization_config
from helpers import pico
from helpers.e2e import edit_json, edit_tensors
from torch import nn

from requant.checkpoint.reader import read_json
from requant.deploy import verify
from requant.errors import InputError
from requant.formats import compressed_tensors as layout
from requant.formats.quantized_format import PackError
from requant.formats.registry import COMPRESSED_TENSORS, open_quantized
from requant.numerics.grid import Grid

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
QUERIES = "model.layers.0.self_attn.q_proj.weight_shape"


def solved(bits: int, group_size: int, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random codes [64, 192], scales and zero points of a linear; scales that are exact with 8-bit codes too."""
    generator = torch.Generator().manual_seed(bits)
    groups = 1 if group_size == -1 else 192 // group_size
    codes = torch.randint(0, 2**bits, (64, 192), generator=generator).to(torch.uint8)
    scale = (torch.rand(64, groups, generator=generator) + 0.5).mul(torch.randn(64, groups).sign()).half().float()
    middle = torch.full((64, groups), float(2 ** (bits - 1)))
    zero = middle if symmetric else torch.randint(0, 2**bits, (64, groups), generator=generator).float()
    return codes, scale, zero


def scheme(bits: int, group_size: int, *, symmetric: bool) -> QuantizationScheme:
    config = layout.quantization_config(
        bits=bits, group_size=group_size, symmetric=symmetric, damp=0.1, overrides={}, quantized=(), meta={}
    )
    return QuantizationConfig.model_validate(config).config_groups["group_0"]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_library_decodes_our_tensors_to_our_weights(bits: int, group_size: int, symmetric: bool) -> None:
    codes, scale, zero = solved(bits, group_size, symmetric=symmetric)
    tensors = layout.pack(codes, scale, zero, bits, symmetric=symmetric)
    named = {s: (tuple(t.shape), t.dtype) for s, t in tensors.items()}
    assert named == layout.shapes(64, 192, bits, group_size, symmetric=symmetric)
    back = layout.unpack(tensors, bits)
    assert all(torch.equal(a, b) for a, b in zip(back, (codes, scale, zero), strict=False))
    stored = tensors | {"weight_scale": tensors["weight_scale"].float()}  # so that its product is not rounded to fp16
    theirs = PackedQuantizationCompressor.decompress(stored, scheme(bits, group_size, symmetric=symmetric))["weight"]
    assert torch.equal(theirs, layout.dequantize(tensors, bits))
    group = torch.arange(192) // (192 // scale.shape[1])
    assert torch.equal(theirs, (codes.float() - zero[:, group]) * scale[:, group])


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_library_packs_the_same_bytes(bits: int, symmetric: bool) -> None:
    codes, scale, zero = solved(bits, 64, symmetric=symmetric)
    ours, middle = layout.pack(codes, scale, zero, bits, symmetric=symmetric), 2 ** (bits - 1)
    state = {
        "weight": layout.dequantize(ours, bits), "weight_scale": scale,
        "weight_zero_point": (zero - middle).to(torch.int8),
    }  # fmt: skip
    theirs = PackedQuantizationCompressor.compress(state, scheme(bits, 64, symmetric=symmetric))
    assert theirs.keys() == ours.keys()
    for suffix in ours.keys() - {"weight_scale"}:
        assert torch.equal(theirs[suffix], ours[suffix]), suffix


def test_what_cannot_be_packed_is_refused() -> None:
    codes, scale, zero = solved(4, 64, symmetric=True)
    with pytest.raises(PackError, match=r"symmetric zero points span 7 to 8, expected 8 to 8"):
        layout.pack(codes, scale, zero - torch.eye(64, 3), 4)
    with pytest.raises(PackError, match=r"zero points span -1 to 8, expected 0 to 15"):
        layout.pack(codes, scale, zero - 9 * torch.eye(64, 3), 4, symmetric=False)
    with pytest.raises(PackError, match=r"not exact in float16"):
        layout.pack(codes, scale * 1e6, zero, 4)
    with pytest.raises(PackError, match=r"group_size 128 does not divide its 192 inputs"):
        layout.shapes(64, 192, 4, 128)


MIXED = (("*.layers.1.mlp.*", {"bits": 8, "group_size": -1, "symmetric": False}), ("*.layers.0.mlp.up_proj", None))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A checkpoint of our own plan and writer with modules of their own settings, beside its source `16bit`."""
    source = pico.save(pico.model(), tmp_path / "16bit", torch.float16)
    pico.packed(source, tmp_path / "out", Grid(4, 32), overrides=MIXED, format="compressed-tensors")
    return tmp_path / "out"


def findings(path: Path, **options: Any) -> list[str]:
    """What is wrong, apart from the tokenizer that the small model lacks."""
    return [str(f) for f in verify(path, **options).findings if f.where != "tokenizer"]


def test_config_and_tensors_say_the_same_to_the_library_and_to_us(written: Path, tmp_path: Path) -> None:
    """Its own matching of the config's targets gives each module what its tensors hold; nothing else is quantized."""
    made, config = pico.model(), read_json(written / "config.json")["quantization_config"]
    apply_quantization_config(made, QuantizationConfig.model_validate(config), show_progress=False)
    theirs = {n: m.quantization_scheme.weights for n, m in made.named_modules() if hasattr(m, "quantization_scheme")}
    reader, rules = open_quantized(written), layout.CompressedTensorsRules(config)
    assert {f"{name}.weight" for name in theirs} == reader.quantized
    assert len(theirs) == 13
    assert "actorder" not in json.dumps(config)  # compressed-tensors 0.17, which vLLM pins, knows fewer of its values
    for name, weights in theirs.items():
        own = rules.of(name, name, made.get_submodule(name))
        assert own is not None
        assert (own.bits, own.group_size, own.symmetric) == (
            weights.num_bits, weights.group_size or -1, weights.symmetric
        )  # fmt: skip
        columns = made.get_submodule(name).in_features
        group = columns if own.group_size == -1 else own.group_size
        assert reader.bits_and_group_size(f"{name}.weight") == (own.bits, group)
    for name in (UP, "lm_head"):
        assert rules.of(name, name, nn.Linear(64, 64)) is None
    assert findings(written, source=tmp_path / "16bit") == []


@pytest.mark.parametrize(
    ("kind", "changes", "beside"),
    [
        ("gpt_neox", {}, {"lm_head"}),
        ("opt", {"word_embed_proj_dim": 32}, {"lm_head", "model.decoder.project_in", "model.decoder.project_out"}),
    ],
)
def test_linears_beside_the_blocks_stay_unquantized(
    tmp_path: Path, kind: str, changes: dict[str, Any], beside: set[str]
) -> None:
    """A head, projections of the embedding: to the library they are of the class Linear too."""
    source = pico.save(pico.model(kind, **changes), tmp_path / "16bit", torch.float16)
    pico.packed(source, tmp_path / "out", Grid(4, 32), format="compressed-tensors")
    made, config = pico.model(kind, **changes), read_json(tmp_path / "out" / "config.json")["quantization_config"]
    apply_quantization_config(made, QuantizationConfig.model_validate(config), show_progress=False)
    linears = {n: m for n, m in made.named_modules() if isinstance(m, nn.Linear)}
    assert {n for n, m in linears.items() if not hasattr(m, "quantization_scheme")} == beside
    assert len(linears) > len(beside)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized', expected 'pack-quantized'"),
        ({"config_groups": {}}, "config_groups is {}, expected groups"),
        ({"config_groups": {"a": 3}}, "config_groups.a: is 3, expected settings"),
        ({"ignore": ["re:(a+)+$b("]}, "ignore has 're:(a+)+$b(', which is no regular expression"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head', expected a list of names"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(written: Path, change: dict[str, Any], told: str) -> None:
    config = read_json(written / "config.json")["quantization_config"]
    edit_json(written / "config.json", quantization_config=config | change)
    assert findings(written)[0].startswith(f"config.json: quantization_config: {told}")
    with pytest.raises(InputError, match=r"quantization_config: "):
        open_quantized(written)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_bits": 5}, "num_bits is 5, expected one of 2, 3, 4, 8"),
        ({"num_bits": True}, "num_bits is True, expected one of 2, 3, 4, 8"),
        ({"type": "float"}, "type is 'float', expected 'int'"),
        ({"symmetric": "yes"}, "symmetric is 'yes', expected true or false"),
        ({"strategy": "block"}, "strategy is 'block' with group_size 32, expected 'group' with a size, or 'channel'"),
        ({"group_size": 0}, "strategy is 'group' with group_size 0, expected"),
        ({"dynamic": True}, "dynamic is True, expected false"),
        ({"actorder": "group"}, "actorder is 'group': engines no longer read"),
    ],
)
def test_settings_that_cannot_be_read_are_named(written: Path, change: dict[str, Any], told: str) -> None:
    config = read_json(written / "config.json")["quantization_config"]
    config["config_groups"]["group_0"]["weights"] |= change
    edit_json(written / "config.json", quantization_config=config)
    assert findings(written)[0].startswith(f"config.json: quantization_config: config_groups.group_0: {told}")


def test_activations_are_not_read(written: Path) -> None:
    config = read_json(written / "config.json")["quantization_config"]
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    edit_json(written / "config.json", quantization_config=config)
    assert "input_activations is {'num_bits': 8}, expected null" in findings(written)[0]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (f"{DOWN}.weight_shape", torch.tensor([64, 64]), "weight_shape [64, 64]: the compressed-tensors checkpoint is"),
        (QUERIES, torch.tensor([64, 128]), f"{QUERIES}: holds [64, 128], but the model's weight is [64, 64]"),
        (f"{DOWN}.weight_scale", torch.zeros(64, 1, dtype=torch.float16), "64 of 64 scales are zero, the first of"),
        (f"{DOWN}.weight_zero_point", None, f"{DOWN}.weight_zero_point: missing: expected int32 [16, 1]"),
        (f"{UP}.weight_packed", torch.zeros(128, 8, dtype=torch.int32), f"{UP}.weight_packed: extra"),
    ],
)
def test_damage_is_found(written: Path, name: str, value: torch.Tensor | None, told: str) -> None:
    (file,) = written.glob("*.safetensors")
    edit_tensors(file, lambda t: {k: v for k, v in t.items() if k != name} | ({} if value is None else {name: value}))
    assert any(told in line for line in findings(written))


def test_tensors_of_no_weight_are_named_by_the_reader(written: Path) -> None:
    (file,) = written.glob("*.safetensors")
    edit_tensors(file, lambda t: t | {f"{DOWN}.weight_shape": torch.tensor([64, 96])})
    with pytest.raises(
        InputError, match=r"the tensors of model.layers.1.mlp.down_proj are not of one weight: .* damaged"
    ):
        open_quantized(written).unpack(f"{DOWN}.weight")
    edit_tensors(file, lambda t: {k: v for k, v in t.items() if k != f"{DOWN}.weight_scale"})
    with pytest.raises(InputError, match=r"down_proj.weight_scale is missing: the compressed-tensors checkpoint"):
        open_quantized(written).read(f"{DOWN}.weight")


def test_recognised_by_its_method_alone() -> None:
    assert COMPRESSED_TENSORS.recognise({"quant_method": "compressed-tensors"})
    assert not COMPRESSED_TENSORS.recognise({"quant_method": "gptq"})

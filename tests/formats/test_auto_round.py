"""`requant.formats.auto_round`: GPTQ's tensors, a config that says more of single modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import edit_json, edit_tensors
from torch import nn

from requant.checkpoint.reader import read_json
from requant.deploy import verify
from requant.errors import InputError
from requant.formats import auto_round as layout
from requant.formats import gptq
from requant.formats.quantized_format import PackError
from requant.formats.registry import AUTO_ROUND, open_quantized
from requant.numerics.grid import Grid

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
MIXED = (("*.layers.1.mlp.*", {"bits": 8, "group_size": -1, "symmetric": False}), ("*.layers.0.mlp.up_proj", None))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_tensors_are_those_of_gptq(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (64, 192), generator=generator).to(torch.uint8)
    scale = (torch.rand(64, 3, generator=generator) - 0.5).half().float()
    zero = torch.full((64, 3), float(2 ** (bits - 1)))
    if not symmetric:
        zero = torch.randint(1, 2**bits, (64, 3), generator=generator).float()
    made, theirs = layout.pack(codes, scale, zero, bits), gptq.pack(codes, scale, zero, bits)
    assert list(made) == ["qweight", "qzeros", "scales"]
    assert all(torch.equal(made[s], theirs[s]) for s in made)
    assert torch.equal(layout.dequantize(made, bits), (codes.float() - zero.repeat_interleave(64, 1))
                       * scale.repeat_interleave(64, 1))  # fmt: skip


def test_zero_points_are_stored_as_they_are_where_a_linear_has_some() -> None:
    codes, scale = torch.arange(64 * 64).reshape(64, 64).to(torch.uint8) % 16, torch.full((64, 2), 0.5)
    zero = torch.arange(128.0).reshape(64, 2) % 16
    written = AUTO_ROUND.of(symmetric=False)
    assert AUTO_ROUND.of(symmetric=True) is AUTO_ROUND
    made = written.pack(codes, scale, zero, 4, symmetric=False)
    assert torch.equal(written.unpack(made, 4)[2], zero)
    with pytest.raises(PackError, match="a zero point is 0, and they are stored minus one"):
        AUTO_ROUND.pack(codes, scale, zero, 4, symmetric=False)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A checkpoint of our own plan and writer with modules of their own settings, beside its source `16bit`."""
    source = pico.save(pico.model(), tmp_path / "16bit", torch.float16)
    pico.packed(source, tmp_path / "out", Grid(4, 32), overrides=MIXED, format="auto-round")
    return tmp_path / "out"


def findings(path: Path, **options: Any) -> list[str]:
    """What is wrong, apart from the tokenizer that the small model lacks."""
    return [str(f) for f in verify(path, **options).findings if f.where != "tokenizer"]


def declared(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path / "config.json")["quantization_config"]
    return found


def test_config_and_tensors_say_the_same(written: Path, tmp_path: Path) -> None:
    assert findings(written, source=tmp_path / "16bit") == []
    config, reader = declared(written), open_quantized(written)
    assert config["packing_format"] == "auto_round"
    assert config["block_name_to_quantize"] == "model.layers"
    assert config["extra_config"][DOWN] == {"bits": 8, "group_size": -1, "sym": False}
    rules, made = layout.AutoRoundRules(config), pico.model()
    for weight in reader.quantized:
        name = weight.removesuffix(".weight")
        own = rules.of(name, name, made.get_submodule(name))
        assert own is not None
        group = own.columns if own.group_size == -1 else own.group_size
        assert reader.bits_and_group_size(weight) == (own.bits, group)
    for name in (UP, "lm_head"):
        assert rules.of(name, name, nn.Linear(64, 64)) is None
    assert len(reader.quantized) == 13


def test_a_module_is_looked_for_by_name_then_by_the_first_pattern_then_by_its_block() -> None:
    usual = {"bits": 4, "group_size": 32, "sym": True}
    extra = {"a.1.up": {"bits": 8}, r".*\.up": {"bits": 3, "sym": False}, r"a\.1\..*": {"bits": 16}}
    rules = layout.AutoRoundRules({**usual, "extra_config": extra, "block_name_to_quantize": [["a.0", "a.1"], "b"]})

    def found(name: str) -> Any:
        packing = rules.of(name, name, nn.Linear(64, 32))
        return packing and (packing.bits, packing.group_size, packing.symmetric)

    assert found("a.1.up") == (8, 32, True)
    assert found("a.0.up") == (3, 32, False)
    assert found("a.1.down") is None
    assert found("b.7.down") == (4, 32, True)
    assert found("lm_head") is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"packing_format": "auto_round:auto_awq"},
            "packing_format is 'auto_round:auto_awq', expected auto_round:auto_gptq or",
        ),
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp', expected 'int'"),
        ({"act_bits": 8}, "act_bits is 8, expected 16: only weights"),
        ({"super_bits": 6}, "super_bits is 6: scales that are quantized are not read"),
        ({"bits": 5}, "bits is 5, expected one of 2, 3, 4, 8"),
        ({"sym": "yes"}, "sym is 'yes', expected true or false"),
        ({"block_name_to_quantize": [3]}, "block_name_to_quantize is [3], expected names of blocks"),
        ({"extra_config": [3]}, "extra_config is [3], expected pairs of module and settings"),
        ({"extra_config": {"(a+)+$b(": {}}}, "extra_config has '(a+)+$b(', which is no regular expression"),
        ({"extra_config": {"a": 3}}, "extra_config of 'a' is 3, expected settings"),
        ({"extra_config": {"a": {"bits": 5}}}, "extra_config of 'a': bits is 5, expected one of 2, 3, 4, 8"),
        ({"extra_config": {"a": {"data_type": "fp"}}}, "extra_config of 'a': data_type is 'fp', expected 'int'"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(written: Path, change: dict[str, Any], told: str) -> None:
    edit_json(written / "config.json", quantization_config=declared(written) | change)
    assert findings(written)[0].startswith(f"config.json: quantization_config: {told}")
    with pytest.raises(InputError, match=r"quantization_config: "):
        open_quantized(written)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (f"{UP}.qweight", torch.zeros(8, 128, dtype=torch.int32), f"{UP}.qweight: extra"),
        (f"{DOWN}.g_idx", torch.zeros(128, dtype=torch.int32), f"{DOWN}.g_idx: extra"),
        (f"{DOWN}.scales", torch.zeros(1, 64, dtype=torch.float16), "64 of 64 scales are zero, the first of"),
        (f"{DOWN}.scales", None, f"{DOWN}.scales: missing: expected float16 [1, 64]"),
        (
            "model.layers.0.mlp.down_proj.qzeros",
            torch.zeros(4, 8, dtype=torch.int32),
            "stores zero point 0, a symmetric 4-bit linear stores 8",
        ),
    ],
)
def test_damage_is_found(written: Path, name: str, value: torch.Tensor | None, told: str) -> None:
    (file,) = written.glob("*.safetensors")
    edit_tensors(file, lambda t: {k: v for k, v in t.items() if k != name} | ({} if value is None else {name: value}))
    assert any(told in line for line in findings(written))


def test_a_zero_point_that_readers_take_for_two(written: Path) -> None:
    """As a file would have it that stores zero points minus one: to AutoRound it is 256, to gptqmodel 0."""
    (file,) = written.glob("*.safetensors")
    edit_json(written / "config.json", quantization_config=declared(written) | {"packing_format": layout.MINUS_ONE})
    edit_tensors(file, lambda t: t | {f"{DOWN}.qzeros": torch.full((1, 16), -1, dtype=torch.int32)})
    assert f"{DOWN}.qzeros: stores zero point 255, which is 256 to AutoRound and 0 to others" in findings(written)


def test_tensors_of_no_weight_are_named_by_the_reader(written: Path) -> None:
    (file,) = written.glob("*.safetensors")
    edit_tensors(file, lambda t: t | {f"{DOWN}.qzeros": torch.zeros(1, 20, dtype=torch.int32)})
    with pytest.raises(InputError, match=r"down_proj are not of one weight: .* the AutoRound checkpoint is damaged"):
        open_quantized(written).unpack(f"{DOWN}.weight")


def test_a_module_in_16_bit_as_autoround_writes_it(written: Path) -> None:
    """Routers, say: bits 16 and data_type float."""
    own = {"bits": 16, "data_type": "float", "act_bits": 16, "act_data_type": "float"}
    config = declared(written)
    edit_json(
        written / "config.json", quantization_config=config | {"extra_config": config["extra_config"] | {UP: own}}
    )
    assert findings(written) == []


def test_a_rule_of_a_wrappers_block_is_of_no_tower_and_of_nothing_carried() -> None:
    name = "layers.0.mlp.up_proj"
    config = layout.quantization_config(
        bits=4, group_size=32, symmetric=True, damp=0.01, overrides={name: {"bits": 8}}, quantized=(), meta={},
        carried=["mtp"], towers=["model.vision_tower"], blocks="model.language_model.layers",
    )  # fmt: skip
    rules = layout.AutoRoundRules(config)
    found = {root: rules.of(f"{root}.{name}", name, nn.Linear(64, 32)) for root in (
        "model.language_model", "model.vision_tower.encoder", "mtp")}  # fmt: skip
    assert {root: own and own.bits for root, own in found.items()} == {
        "model.language_model": 8, "model.vision_tower.encoder": None, "mtp": None
    }  # fmt: skip

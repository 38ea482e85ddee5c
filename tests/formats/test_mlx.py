"""`requant.formats.mlx`: scale times code plus bias; in MLX itself: test_mlx_library.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import edit_json, edit_tensors, make_model
from safetensors.torch import load_file
from torch import nn

from requant.checkpoint.reader import read_json
from requant.deploy import verify
from requant.deploy.conversion import convert
from requant.deploy.gguf_export import export
from requant.errors import InputError
from requant.formats import mlx as layout
from requant.formats.quantized_format import PackError
from requant.formats.registry import MLX, open_quantized
from requant.modeling.token_ends import EndBits
from requant.numerics.grid import Grid

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
MIXED = (("*.layers.1.mlp.*", {"bits": 8, "group_size": 64, "symmetric": False}), ("*.layers.0.mlp.up_proj", None))


def by_the_book(tensors: dict[str, torch.Tensor], bits: int, group_size: int) -> torch.Tensor:
    """MLX's own documented arithmetic in fp64: bit i * bits on of a row's words is code i."""
    rows, words = tensors["weight"].shape
    columns = 32 * words // bits
    out = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        number = sum(int(word) << (32 * at) for at, word in enumerate(tensors["weight"][row].tolist()))
        for i in range(columns):
            scale, bias = (float(tensors[s][row, i // group_size]) for s in ("scales", "biases"))
            out[row, i] = scale * ((number >> (bits * i)) % 2**bits) + bias
    return out


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_and_symmetric_biases_are_exact(bits: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (32, 256), generator=generator).to(torch.uint8)
    scale = ((torch.rand(32, 256 // group_size, generator=generator) - 0.5) / 16).half().float()
    zero = torch.full_like(scale, 2 ** (bits - 1))
    made = layout.pack(codes, scale, zero, bits)
    assert {s: (tuple(t.shape), t.dtype) for s, t in made.items()} == layout.shapes(32, 256, bits, group_size)
    assert all(torch.equal(a, b) for a, b in zip(layout.unpack(made, bits), (codes, scale, zero), strict=False))
    assert torch.equal(layout.dequantize(made, bits).double(), by_the_book(made, bits, group_size))


def test_other_biases_are_rounded_to_float16() -> None:
    codes = torch.zeros(32, 64, dtype=torch.uint8)
    scale = torch.linspace(0.01, 0.02, 64).reshape(32, 2).half().float()
    zero = torch.arange(64.0).reshape(32, 2) % 16
    found = layout.unpack(layout.pack(codes, scale, zero, 4), 4)[2]
    assert 0 < float((found - zero).abs().max()) <= 15 * MLX.zero_rounding
    assert bool(((found - zero).abs() <= zero * MLX.zero_rounding).all())


def test_what_cannot_be_packed_is_refused() -> None:
    codes, scale = torch.zeros(32, 64, dtype=torch.uint8), torch.full((32, 2), 600.0)
    with pytest.raises(PackError, match="a zero point times its scale is too large for float16"):
        layout.pack(codes, scale, torch.full((32, 2), 128.0), 8)
    for group_size, told in ((-1, "a whole row"), (16, "16")):
        with pytest.raises(PackError, match=f"MLX has groups of 32, 64, 128 inputs, not of {told}"):
            layout.shapes(32, 64, 4, group_size)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A checkpoint in MLX's format, made of the GPTQ one beside it, `gptq`, of `model`."""
    make_model(tmp_path / "model", hidden=64)
    pico.packed(tmp_path / "model", tmp_path / "gptq", Grid(4, 32, signed=True), overrides=MIXED)
    convert(tmp_path / "gptq", tmp_path / "out", "mlx")
    return tmp_path / "out"


def findings(path: Path, **options: Any) -> list[str]:
    return [str(finding) for finding in verify(path, **options).findings]


def declared(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path / "config.json")["quantization_config"]
    return found


def declare(path: Path, change: dict[str, Any]) -> None:
    edit_json(path / "config.json", **dict.fromkeys(layout.CONFIG_KEYS, declared(path) | change))


def test_a_conversion_says_by_how_much_it_rounds(written: Path, tmp_path: Path) -> None:
    assert findings(written, source=tmp_path / "model") == []
    one, other = open_quantized(tmp_path / "gptq"), open_quantized(written)
    assert one.quantized == other.quantized
    rounded = {f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    for name in one:
        assert torch.equal(one.read(name), other.read(name)) == (name not in rounded), name
    done = convert(tmp_path / "gptq", tmp_path / "again", "mlx")
    steps = [(other.unpack(n)[2] - one.unpack(n)[2]).abs().max() for n in rounded]
    assert done.largest_rounding == float(max(steps))
    with pytest.raises(InputError, match=r"gate_proj cannot be stored as gptq: zero points, .* are not whole numbers"):
        convert(written, tmp_path / "back", "gptq")


def test_config_and_tensors_say_the_same(written: Path) -> None:
    config, reader = declared(written), open_quantized(written)
    assert read_json(written / "config.json")["quantization"] == config
    assert config[UP] is False
    assert config[DOWN] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert (config["group_size"], config["bits"]) == (32, 4)
    assert reader.bits_and_group_size(f"{DOWN}.weight") == (8, 64)
    assert layout.MlxRules(config).of(UP, UP, nn.Linear(64, 128)) is None
    assert load_file(written / "model.safetensors")[f"{DOWN}.weight"].dtype == torch.uint32


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bits": 6}, "bits is 6, expected one of 2, 3, 4, 8"),
        ({"group_size": -1}, "group_size is -1, expected one of 32, 64, 128"),
        ({"mode": "mxfp4"}, "mode is 'mxfp4', expected 'affine'"),
        ({DOWN: 3}, f"'{DOWN}' is 3, expected settings, or false for 16 bit"),
        ({DOWN: {"bits": 5}}, f"'{DOWN}': bits is 5, expected one of 2, 3, 4, 8"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(written: Path, change: dict[str, Any], told: str) -> None:
    declare(written, change)
    assert findings(written)[0] == f"config.json: quantization_config: {told}"
    with pytest.raises(InputError, match=r"quantization_config: "):
        open_quantized(written)


def test_two_configs_that_differ_are_told(written: Path) -> None:
    edit_json(written / "config.json", quantization=declared(written) | {"bits": 8})
    assert findings(written) == [
        "config.json: quantization: is not what quantization_config says: MLX goes by the first"
    ]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (f"{DOWN}.scales", torch.zeros(64, 2, dtype=torch.float16), "128 of 128 scales are zero, the first of"),
        (f"{DOWN}.biases", torch.full((64, 2), torch.nan).half(), f"{DOWN}.biases: 128 of 128 biases are not finite"),
        (f"{DOWN}.biases", None, f"{DOWN}.biases: missing: expected float16 [64, 2]"),
        (f"{DOWN}.weight", torch.zeros(64, 16).to(torch.uint32), f"{DOWN}.weight: shape [64, 16], expected [64, 32]"),
        (f"{UP}.scales", torch.zeros(128, 2, dtype=torch.float16), f"{UP}.scales: extra"),
    ],
)
def test_damage_is_found(written: Path, name: str, value: torch.Tensor | None, told: str) -> None:
    (file,) = written.glob("*.safetensors")
    edit_tensors(file, lambda t: {k: v for k, v in t.items() if k != name} | ({} if value is None else {name: value}))
    assert any(told in line for line in findings(written))


def test_settings_that_the_tensors_do_not_have_are_named_by_the_reader(written: Path) -> None:
    declare(written, {DOWN: {"bits": 4, "group_size": 64}})
    with pytest.raises(InputError, match=r"down_proj are not of one weight: .* the MLX checkpoint is damaged"):
        open_quantized(written).unpack(f"{DOWN}.weight")


def test_recognised_by_what_it_says_and_what_it_does_not() -> None:
    assert MLX.recognise({"group_size": 64, "bits": 4})
    assert not MLX.recognise({"group_size": 128, "bits": 4, "sym": True, "desc_act": False})
    assert not MLX.recognise({"quant_method": "gptq", "bits": 4, "group_size": 32})


def test_what_is_symmetric_in_fact_is_made_symmetric(tmp_path: Path) -> None:
    """No config of MLX says so: Q4_0 blocks in GGUF, which Q4_1 would round, and GPTQ that servers load."""
    make_model(tmp_path / "model", hidden=64)
    pico.packed(tmp_path / "model", tmp_path / "gptq", Grid(4, 32, signed=True))
    convert(tmp_path / "gptq", tmp_path / "mlx", "mlx")
    done = export(tmp_path / "mlx", tmp_path / "gguf")
    assert done.largest_rounding == 0
    assert done.kinds["Q4_0"] == 14
    assert "Q4_1" not in done.kinds
    convert(tmp_path / "mlx", tmp_path / "back", "gptq")
    assert read_json(tmp_path / "back" / "config.json")["quantization_config"]["sym"] is True
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("gptq", "back"))
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())


def test_files_as_mlx_lm_writes_them_are_read(tmp_path: Path) -> None:
    """With quantized ends of which the config says nothing, and biases of no whole zero point."""
    make_model(tmp_path / "model", hidden=64)
    pico.packed(tmp_path / "model", tmp_path / "gptq", Grid(4, 32))
    out = tmp_path / "out"
    convert(tmp_path / "gptq", out, "mlx", ends=EndBits(embeddings=4, head=4))

    def drift(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("biases"):
                tensors[name] = (tensors[name].float() * 1.03).half()

    edit_tensors(out / "model.safetensors", drift)
    usual = {key: value for key, value in declared(out).items() if key in ("bits", "group_size", "mode")}
    edit_json(out / "config.json", **dict.fromkeys(layout.CONFIG_KEYS, usual))
    assert findings(out) == []
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= open_quantized(out).quantized
    with pytest.raises(InputError, match=r"model.embed_tokens: its shape .* is not a multiple of 32 both ways"):
        convert(out, tmp_path / "ct", "compressed-tensors")


@pytest.mark.parametrize(
    ("rope", "told"),
    [
        ({"rope_theta": 1e5, "rope_type": "default"}, {"rope_theta": 1e5}),
        (
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        ({"full_attention": {"rope_theta": 1e6}}, {}),
        (None, {}),
    ],
)
def test_rotary_settings_have_the_names_that_mlx_looks_for(rope: Any, told: dict[str, Any]) -> None:
    assert layout.rotary_settings({"rope_parameters": rope}) == told

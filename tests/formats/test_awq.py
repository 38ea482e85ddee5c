"""`requant.formats.awq`, held against gptqmodel's packing and decoding of the same layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq
from helpers import pico
from helpers.e2e import edit_json, edit_tensors, make_model
from torch import nn

from requant.checkpoint.reader import read_json
from requant.deploy import gguf_export, verify
from requant.deploy.conversion import convert
from requant.deploy.gguf_verification import verify_gguf
from requant.errors import InputError
from requant.formats import awq as layout
from requant.formats import gptq
from requant.formats.registry import FORMATS, READ_ONLY, open_quantized
from requant.numerics.grid import Grid

UP, LEFT = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"


def packed(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> dict[str, torch.Tensor]:
    """One linear as gptqmodel packs it. codes: [out, in]. scale, zero: [out, groups]."""
    qweight, qzeros = pack_awq(codes.T.int(), zero.T.int(), 4)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scale.T.half().contiguous()}


@pytest.mark.parametrize("group_size", [32, 64, 192])
def test_decodes_what_gptqmodel_packs_and_as_it_does(group_size: int) -> None:
    generator = torch.Generator().manual_seed(group_size)
    groups = 192 // group_size
    codes = torch.randint(0, 16, (64, 192), generator=generator).to(torch.uint8)
    zero = torch.randint(0, 16, (64, groups), generator=generator).float()
    scale = (torch.rand(64, groups, generator=generator) + 0.1).half().float()
    tensors = packed(codes, scale, zero)
    assert {s: (tuple(t.shape), t.dtype) for s, t in tensors.items()} == layout.shapes(64, 192, 4, group_size)
    ours = layout.unpack(tensors)
    assert all(torch.equal(a, b) for a, b in zip(ours, (codes, scale, zero), strict=False))
    theirs = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"].float(), 4, group_size).T
    group = torch.arange(192) // group_size
    assert torch.equal(theirs, (ours[0].float() - ours[2][:, group]) * ours[1][:, group])


def as_awq(path: Path) -> None:
    """Pack a GPTQ checkpoint of ours, of 4 bits in groups of 32, as AutoAWQ does."""
    (file,) = path.glob("*.safetensors")

    def repack(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in gptq.SUFFIXES}
        for stem in {n.rpartition(".")[0] for n in tensors} - {n.rpartition(".")[0] for n in made}:
            codes, scale, zero, _ = gptq.unpack({s: tensors[f"{stem}.{s}"] for s in gptq.SUFFIXES}, 4)
            made |= {f"{stem}.{s}": t for s, t in packed(codes, scale, zero).items()}
        return made

    edit_tensors(file, repack)
    (path / gptq.CONFIG_FILE).unlink()
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    edit_json(path / "config.json", quantization_config={**config, "modules_to_not_convert": [LEFT]})


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    """An AWQ checkpoint with one linear in 16 bit, beside the GPTQ one it was made of, `gptq`, and its `model`."""
    make_model(tmp_path / "model", hidden=64)
    options: dict[str, Any] = {"overrides": ((f"*{LEFT}", None),)}
    for name in ("gptq", "awq"):
        pico.packed(tmp_path / "model", tmp_path / name, Grid(4, 32, symmetric=False), **options)
    as_awq(tmp_path / "awq")
    return tmp_path / "awq"


def findings(path: Path, **options: Any) -> list[str]:
    return [str(finding) for finding in verify(path, **options).findings]


def declared(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path / "config.json")["quantization_config"]
    return found


def test_verified_and_converted_exactly(awq: Path, tmp_path: Path) -> None:
    assert findings(awq, source=tmp_path / "model") == []
    one = open_quantized(awq)
    assert len(one.quantized) == 13
    for to in FORMATS.keys() - {"mlx"}:  # which rounds zero points
        done = convert(awq, tmp_path / f"as-{to}", to)
        assert (done.linears, done.dropped) == (13, {})
        for other in (open_quantized(tmp_path / "gptq"), open_quantized(tmp_path / f"as-{to}")):
            assert other.quantized == one.quantized
            assert all(torch.equal(other.read(name), one.read(name)) for name in one)
    made = gguf_export.export(awq, tmp_path / "gguf")
    assert made.kinds["Q4_1"] == 13
    assert verify_gguf(tmp_path / "gguf" / made.file, source=awq).findings == []


def test_names_of_autoawqs_own_file_are_read(awq: Path) -> None:
    """`w_bit` and `q_group_size`, `version` in capitals, as its quant_config.json has them."""
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    edit_json(awq / "config.json", quantization_config={**config, "modules_to_not_convert": [LEFT]})
    assert findings(awq) == []


def test_a_zero_point_of_0_has_no_place_in_gptq(awq: Path, tmp_path: Path) -> None:
    (file,) = awq.glob("*.safetensors")
    edit_tensors(file, lambda t: t | {f"{UP}.qzeros": torch.zeros_like(t[f"{UP}.qzeros"])})
    with pytest.raises(
        InputError, match=rf"{UP} cannot be stored as gptq: a zero point is 0, .*: compressed-tensors has it"
    ):
        convert(awq, tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()
    convert(awq, tmp_path / "out", "compressed-tensors")
    assert not bool(open_quantized(tmp_path / "out").unpack(f"{UP}.weight")[2].any())


def test_modules_are_left_by_parts_of_their_names() -> None:
    rules = layout.AwqRules({"bits": 4, "group_size": 32, "modules_to_not_convert": ["gate", "layers.1", "visual."]})
    left = ["a.mlp.gate", "model.layers.1.mlp.up", "visual.blocks.0.qkv"]
    taken = ["a.mlp.gate_proj", "model.layers.10.mlp.up", "a.visual_proj"]
    assert [rules.of(name, name, nn.Linear(64, 32)) for name in left] == [None] * 3
    assert [p and p.bits for p in (rules.of(name, name, nn.Linear(64, 32)) for name in taken)] == [4] * 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": "gemv"}, "version is 'gemv', expected 'gemm': other packings are not read"),
        ({"bits": 8}, "bits is 8, expected 4"),
        ({"group_size": "128"}, "group_size is '128', expected -1 or a positive number"),
        ({"zero_point": False}, "zero_point is False, expected true: without them it is not read"),
        ({"lm_head": True}, "lm_head is True: a quantized head is not read"),
        ({"dynamic": {"+:a": {}}}, "dynamic is {'+:a': {}}: settings of single modules are not read"),
        ({"modules_to_not_convert": "gate"}, "modules_to_not_convert is 'gate', expected a list of names"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(awq: Path, change: dict[str, Any], told: str) -> None:
    edit_json(awq / "config.json", quantization_config=declared(awq) | change)
    assert findings(awq)[0] == f"config.json: quantization_config: {told}"
    with pytest.raises(InputError, match=r"quantization_config: "):
        open_quantized(awq)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (f"{UP}.qzeros", torch.zeros(2, 8, dtype=torch.int32), f"{UP}.qzeros: shape [2, 8], expected [2, 16] for 4"),
        (f"{UP}.scales", torch.zeros(2, 128, dtype=torch.float16), "256 of 256 scales are zero, the first of"),
        (f"{UP}.qweight", None, f"{UP}.qweight: missing: expected int32 [64, 16]"),
        (f"{LEFT}.qweight", torch.zeros(64, 8, dtype=torch.int32), f"{LEFT}.qweight: extra"),
    ],
)
def test_damage_is_found(awq: Path, name: str, value: torch.Tensor | None, told: str) -> None:
    (file,) = awq.glob("*.safetensors")
    edit_tensors(file, lambda t: {k: v for k, v in t.items() if k != name} | ({} if value is None else {name: value}))
    assert any(told in line for line in findings(awq))


def test_tensors_of_no_weight_are_named_by_the_reader(awq: Path) -> None:
    (file,) = awq.glob("*.safetensors")
    edit_tensors(file, lambda t: t | {f"{UP}.scales": torch.ones(3, 128, dtype=torch.float16)})
    with pytest.raises(InputError, match=r"up_proj are not of one weight: .* the AWQ checkpoint is damaged"):
        open_quantized(awq).unpack(f"{UP}.weight")


def test_it_is_read_and_not_written() -> None:
    assert "awq" in READ_ONLY
    assert "awq" not in FORMATS

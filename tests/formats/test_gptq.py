"""`requant.formats.gptq`: bytes of a bit stream in Python and of gptqmodel's packer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import oracle
from hypothesis import given
from hypothesis import strategies as st

from requant.formats import gptq as gptq_format
from requant.formats.quantized_format import PackError

BITS = [2, 3, 4, 8]


def fixture(bits: int, rows: int = 64, columns: int = 128, group: int = 32, seed: int = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8)
    scale = (torch.rand(rows, columns // group, generator=g) * 0.01 + 0.005).half().float()
    zero = torch.randint(1, 2**bits, (rows, columns // group), generator=g).float()
    return codes, scale, zero


@given(bits=st.sampled_from(BITS), words=st.integers(1, 6), columns=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_unpack_undoes_pack(bits: int, words: int, columns: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (32 * words, columns), generator=g, dtype=torch.uint8)
    packed = gptq_format.pack_rows(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.int32, (words * bits, columns))
    assert torch.equal(gptq_format.unpack_rows(packed, bits), codes)


@given(bits=st.sampled_from(BITS), seed=st.integers(0, 2**16))
def test_columns_are_one_little_endian_number(bits: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (96, 3), generator=g, dtype=torch.uint8)
    expected = [oracle.pack_column(codes[:, j].tolist(), bits) for j in range(3)]
    assert gptq_format.pack_rows(codes, bits).T.tolist() == expected


@given(bits=st.sampled_from(BITS), seed=st.integers(0, 2**16), group=st.sampled_from([32, 64, 128]))
def test_whole_linears_round_trip(bits: int, seed: int, group: int) -> None:
    codes, scale, zero = fixture(bits, group=group, seed=seed)
    got = gptq_format.unpack(gptq_format.pack(codes, scale, zero, bits), bits)
    for a, b in zip(got, (codes, scale, zero, torch.arange(128) // group), strict=True):
        assert torch.equal(a, b)


def word(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


def test_golden_words() -> None:
    """Lowest bits are the lowest index; written out by hand."""
    four = torch.arange(8, dtype=torch.uint8)[:, None].repeat(4, 1)
    assert gptq_format.pack_rows(four, 4).flatten().tolist() == [0x76543210] * 4
    assert gptq_format.pack_rows(torch.full((32, 1), 15, dtype=torch.uint8), 4).flatten().tolist() == [-1] * 4
    eight = torch.tensor([1, 2, 3, 255] * 8, dtype=torch.uint8)[:, None]
    assert gptq_format.pack_rows(eight, 8).flatten().tolist() == [word(0xFF030201)] * 8
    two = torch.tensor([0, 1, 2, 3] * 8, dtype=torch.uint8)[:, None]
    assert gptq_format.pack_rows(two, 2).flatten().tolist() == [word(0xE4E4E4E4)] * 2
    three = torch.zeros(32, 1, dtype=torch.uint8)
    three[10], three[21] = 7, 7  # the two codes that straddle a word
    assert gptq_format.pack_rows(three, 3).flatten().tolist() == [word(0xC0000000), word(0x80000001), 0b11]


@pytest.mark.parametrize(("bits", "expected"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_zero_words(bits: int, expected: int) -> None:
    """The middle, stored minus one: the constants that servers check."""
    codes, scale, _ = fixture(bits)
    tensors = gptq_format.pack(codes, scale, torch.full_like(scale, 2 ** (bits - 1)), bits)
    assert set(tensors["qzeros"].flatten().tolist()) == {expected}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("wrong", [-1.0, 0.5, 1.0000001, float("nan"), float("inf"), "beyond"])
def test_only_whole_codes_and_zero_points_in_range_are_packed(bits: int, wrong: float | str) -> None:
    """A zero point of 2.5 would become 2, a code of 2^bits would change its neighbour."""
    codes, scale, zero = fixture(bits)
    value = float(2**bits) if wrong == "beyond" else float(wrong)
    for place in (codes, zero):
        spoilt = place.float()
        spoilt[3, 1] = value
        with pytest.raises(PackError, match=r"span|whole"):
            gptq_format.pack(*((spoilt, scale, zero) if place is codes else (codes, scale, spoilt)), bits)
    with pytest.raises(PackError, match=r"codes (span|are not whole)"):
        gptq_format.pack_rows(torch.full((32, 1), value), bits)


def test_a_code_too_wide_for_its_bits_is_refused() -> None:
    codes, scale, zero = fixture(4)
    codes[0, 0] = 16
    with pytest.raises(PackError, match=r"codes span 0 to 16, expected 0 to 15"):
        gptq_format.pack(codes, scale, zero, 4)
    codes[0, 0] = 15
    with pytest.raises(PackError, match=r"do not fit"):
        gptq_format.pack(codes[:, :96], scale[:, :1].expand(-1, 5), zero[:, :1].expand(-1, 5), 4)


@pytest.mark.parametrize("bits", BITS)
def test_shapes_are_what_pack_makes(bits: int) -> None:
    """4-bit [576 in, 1536 out] in groups of 64 costs 4.33 bits a weight."""
    codes, scale, zero = fixture(bits, 96, 192, 64)
    made = {name: (tuple(t.shape), t.dtype) for name, t in gptq_format.pack(codes, scale, zero, bits).items()}
    assert made == gptq_format.shapes(96, 192, bits, 64)
    layout = gptq_format.shapes(1536, 576, 4, 64)
    assert {n: s for n, (s, _) in layout.items()} == {
        "qweight": (72, 1536),
        "qzeros": (9, 192),
        "scales": (9, 1536),
        "g_idx": (576,),
    }
    assert gptq_format.shapes(64, 96, 4, -1)["scales"][0] == (1, 64)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(PackError, match=r"group_size 128 does not divide its 192 inputs; use 64 or 32 or -1"):
        gptq_format.shapes(64, 192, 4, 128)
    with pytest.raises(PackError, match=r"not a multiple of 32 both ways"):
        gptq_format.shapes(40, 128, 4, 32)
    with pytest.raises(PackError, match=r"30 codes"):
        gptq_format.pack_rows(torch.zeros(30, 1, dtype=torch.uint8), 4)
    codes, scale, zero = fixture(4)
    with pytest.raises(PackError, match=r"not exact in float16"):
        gptq_format.pack(codes, scale + 1e-6, zero, 4)
    with pytest.raises(PackError, match=r"not exact in float16"):
        gptq_format.pack(codes, torch.full_like(scale, float("inf")), zero, 4)
    with pytest.raises(PackError, match=r"a zero point is 0, and they are stored minus one: compressed-tensors has it"):
        gptq_format.pack(codes, scale, torch.zeros_like(zero), 4)


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_the_formula(bits: int) -> None:
    codes, scale, zero = fixture(bits)
    expected = oracle.codes_to_weight(codes, scale, zero)
    tensors = gptq_format.pack(codes, scale, zero, bits)
    assert torch.allclose(gptq_format.dequantize(tensors, bits).double(), expected, rtol=1e-6, atol=0)


def test_any_g_idx_is_followed() -> None:
    """A desc_act checkpoint of another tool: column i belongs to group g_idx[i]."""
    codes, scale, zero = fixture(4)
    order = torch.randperm(128)
    tensors = gptq_format.pack(codes, scale, zero, 4)
    expected = gptq_format.dequantize(tensors, 4)
    shuffled = gptq_format.pack(codes[:, order].contiguous(), scale, zero, 4) | {"g_idx": (order // 32).int()}
    assert torch.equal(gptq_format.dequantize(shuffled, 4), expected[:, order])


def test_v2_zeros_are_not_shifted() -> None:
    codes, scale, zero = fixture(4)
    tensors = gptq_format.pack(codes, scale, zero, 4)
    v2 = tensors | {"qzeros": gptq_format.pack_rows(zero.to(torch.uint8), 4).T.contiguous()}
    assert torch.equal(gptq_format.dequantize(v2, 4, v2=True), gptq_format.dequantize(tensors, 4))


def test_config_names_only_exact_modules() -> None:
    config = gptq_format.quantization_config(
        bits=4, group_size=64, symmetric=True, damp=0.01, meta={"tool": "requant"}, quantized=["mlp.up_proj"],
        overrides={"model.layers.1.mlp.down_proj": {"bits": 8}, "model.layers.0.self_attn.o_proj": None},
    )  # fmt: skip
    assert config["dynamic"] == {
        r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 8},
        r"-:^model\.layers\.0\.self_attn\.o_proj$": {},
    }
    assert config["modules_in_block_to_quantize"] == [["mlp.up_proj"]]
    fixed = {"quant_method": "gptq", "checkpoint_format": "gptq", "desc_act": False, "lm_head": False, "sym": True}
    assert fixed.items() <= config.items()
    plain = gptq_format.quantization_config(
        bits=8, group_size=-1, symmetric=False, damp=0.05, meta={}, quantized=[], overrides={}
    )
    assert "dynamic" not in plain
    assert "modules_in_block_to_quantize" not in plain
    assert (plain["bits"], plain["group_size"], plain["sym"]) == (8, -1, False)


def test_a_rule_of_a_wrappers_block_is_of_no_tower_and_of_nothing_carried() -> None:
    """`dynamic` is read in its order, and such a rule matches the end of a name."""
    name = "layers.0.mlp.up_proj"
    config = gptq_format.quantization_config(
        bits=4, group_size=32, symmetric=True, damp=0.01, meta={}, quantized=[], overrides={name: {"bits": 8}},
        carried=["mtp"], towers=["model.vision_tower"],
    )  # fmt: skip
    rules = gptq_format.GptqRules(config)
    roots = ("model.language_model", "model.vision_tower.encoder", "mtp")
    found = [rules.of(f"{root}.{name}", name, torch.nn.Linear(64, 32)) for root in roots]
    assert [own and own.bits for own in found] == [8, None, None]


@pytest.fixture(scope="module")
def torch_linear() -> Any:
    return pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("packer", ["pack", "pack_original"])
def test_bytes_are_those_of_gptqmodel(torch_linear: Any, bits: int, group: int, packer: str) -> None:
    """gptqmodel's packer and its conversion to format v1 write the same tensors.

    It gets the dequantized weight.
    """
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    rows, columns = 96, 128
    codes, scale, zero = fixture(bits, rows, columns, group)
    ours = gptq_format.pack(codes, scale, zero, bits)
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = gptq_format.dequantize(ours, bits)
    theirs = torch_linear(
        bits=bits, group_size=group, sym=False, desc_act=False, in_features=columns, out_features=rows, bias=False,
        register_buffers=True,
    )  # fmt: skip
    getattr(theirs, packer)(linear, scale.clone(), zero.clone(), ours["g_idx"].clone())
    convert_gptq_v2_to_v1_format_module(theirs, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    written = {name: getattr(theirs, name) for name in gptq_format.SUFFIXES}
    for name, tensor in ours.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name
    assert torch.equal(gptq_format.dequantize(written, bits), linear.weight.data)

"""`requant.formats.registry`: whatever the stages call of a layout works together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import pico

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.formats.gptq_reader import GptqReader
from requant.formats.quantized_format import QuantizedFormat
from requant.formats.registry import FORMATS, open_quantized
from requant.numerics.grid import Grid


@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
def test_a_layout_packs_what_its_shapes_say_and_recognises_its_config(layout: QuantizedFormat) -> None:
    codes = torch.arange(64 * 64).reshape(64, 64).to(torch.uint8) % 16
    scale, zero = torch.full((64, 2), 0.5), torch.full((64, 2), 8.0)
    for symmetric in (True, False):
        tensors = layout.pack(codes, scale, zero, 4, symmetric=symmetric)
        named = {s: (tuple(t.shape), t.dtype) for s, t in tensors.items()}
        assert named == dict(layout.shapes(64, 64, 4, 32, symmetric=symmetric))
    assert tuple(tensors) == layout.suffixes
    assert torch.equal(layout.unpack(tensors, 4)[0], codes)
    assert torch.equal(layout.dequantize(tensors, 4), (codes.float() - 8) * 0.5)
    config = layout.config(bits=4, group_size=32, symmetric=True, damp=0.1, overrides={}, quantized=(), meta={})
    assert layout.recognise(config)
    assert not layout.recognise({"quant_method": "bitsandbytes"})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_reader_finds_bits_and_groups_from_headers(tmp_path: Path, bits: int) -> None:
    source = pico.save(pico.model(), tmp_path / "merged", torch.float16)
    pico.packed(source, tmp_path / "out", Grid(bits, 32))
    reader = open_quantized(tmp_path / "out")
    assert reader.quantized
    for name in reader.quantized:
        assert name in reader
        assert reader.bits_and_group_size(name) == (bits, 32)
        assert int(reader.unpack(name)[0].max()) < 2**bits
    assert not any(n.endswith(("qweight", "qzeros", "scales", "g_idx")) for n in reader)


@pytest.mark.parametrize(
    ("shape", "told"), [(None, "is missing"), ((4, 16), r"shape \[4, 16\]"), ((0,), r"shape \[0\]")]
)
def test_the_reader_names_a_tensor_that_is_no_part_of_a_weight(
    tmp_path: Path, shape: tuple[int, ...] | None, told: str
) -> None:
    source = pico.save(pico.model(), tmp_path / "merged", torch.float16)
    pico.packed(source, tmp_path / "out", Grid(4, 32))
    name = "model.layers.0.mlp.up_proj.g_idx"
    pico.edit_tensors(
        tmp_path / "out" / "model.safetensors", drop=() if shape else (name,),
        change={name: lambda _: torch.zeros(shape, dtype=torch.int32)} if shape else {},
    )  # fmt: skip
    with pytest.raises(InputError, match=f"{name} (has )?{told}"):
        open_quantized(tmp_path / "out").bits_and_group_size("model.layers.0.mlp.up_proj.weight")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    source = pico.save(pico.model(), tmp_path / "merged", torch.float16)
    pico.packed(source, tmp_path / "out", Grid(4, 32))
    reader = open_quantized(tmp_path / "out")
    name = min(reader.quantized)
    stem = name.removesuffix("weight")
    kept = {n: reader.checkpoint.read(n) for n in reader.checkpoint if n != f"{stem}qzeros"}
    from safetensors.torch import save_file

    for file in (tmp_path / "out").glob("*.safetensors*"):
        file.unlink()
    save_file(kept, tmp_path / "out" / "model.safetensors")
    with pytest.raises(InputError, match=rf"{stem}qzeros is missing: the GPTQ checkpoint is damaged"):
        open_quantized(tmp_path / "out").read(name)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_a_tensor_of_another_weight_is_named(tmp_path: Path, suffix: str) -> None:
    """Turned, or of other groups: healing would multiply what does not belong together."""
    source = pico.save(pico.model(), tmp_path / "merged", torch.float16)
    pico.packed(source, tmp_path / "out", Grid(4, 32))
    name = "model.layers.0.mlp.down_proj.weight"
    part = f"{name.removesuffix('weight')}{suffix}"
    pico.edit_tensors(tmp_path / "out" / "model.safetensors", change={part: lambda t: t.T})
    reader = open_quantized(tmp_path / "out")
    for use in (reader.read, reader.unpack, reader.bits_and_group_size):
        with pytest.raises(
            InputError, match=r"the tensors of model.layers.0.mlp.down_proj are not of one weight: .*dam"
        ):
            use(name)


def test_a_checkpoint_is_read_by_the_format_that_recognises_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new format is one entry: what reads a checkpoint back asks them all."""
    source = pico.save(pico.model(), tmp_path / "merged", torch.float16)
    pico.packed(source, tmp_path / "out", Grid(4, 32))
    assert isinstance(open_quantized(tmp_path / "out"), GptqReader)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["quant_method"] = "sparse"
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="quant_method is 'sparse', expected one of gptq"):
        open_quantized(tmp_path / "out")
    opened: list[Path] = []

    def reader(checkpoint: Checkpoint) -> GptqReader:
        opened.append(checkpoint.path)
        return GptqReader(checkpoint)

    sparse = replace(FORMATS["gptq"], recognise=lambda c: c.get("quant_method") == "sparse", reader=reader)
    monkeypatch.setitem(FORMATS, "sparse", sparse)
    open_quantized(tmp_path / "out")
    assert opened == [tmp_path / "out"]
    config["quantization_config"]["quant_method"] = "exl3"
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"quant_method is 'exl3', expected one of gptq, .*, sparse"):
        open_quantized(tmp_path / "out")

"""Quantized token embeddings and head, against the decoders of the formats' own packages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.apply import apply_quantization_config
from helpers import pico
from helpers.e2e import edit_json, edit_tensors, make_model, make_tokenizer
from safetensors.torch import load_file
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.deploy import conversion, verify
from requant.deploy.conversion import convert
from requant.deploy.gguf_export import export
from requant.deploy.gguf_verification import verify_gguf
from requant.errors import InputError, StageError
from requant.evaluate import variants
from requant.formats.registry import open_quantized
from requant.modeling import skeleton
from requant.modeling.token_ends import EndBits, TokenEnds
from requant.numerics.grid import Grid, nearest_rows

CT = "compressed-tensors"
EMBED, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ checkpoint of 4 bits in groups of 32, whose ends are two matrices."""
    out = tmp_path_factory.mktemp("ends")
    make_model(out / "model", hidden=64)
    pico.packed(out / "model", out / "gptq", Grid(4, 32))
    return out / "gptq"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, whose ends are one matrix."""
    out = tmp_path_factory.mktemp("tied")
    make_model(out / "model", hidden=64, tied=True)
    pico.packed(out / "model", out / "gptq", Grid(4, 32))
    return out / "gptq"


def expected(source: Path, module: str, bits: int) -> Tensor:
    """A matrix of the source, rounded to nearest: at 8 bits on the range of each group."""
    grid = Grid(bits, 32, search="minmax" if bits == 8 else "hessian")
    return nearest_rows(Checkpoint(source).read(f"{module}.weight"), grid)


@pytest.mark.parametrize(("embeddings", "head"), [(8, 4), (4, 8), (8, None), (None, 4)])
@pytest.mark.parametrize("to", [CT, "mlx"])
def test_ends_are_rounded_and_the_rest_stays(
    gptq: Path, tmp_path: Path, to: str, embeddings: int | None, head: int | None
) -> None:
    done = convert(gptq, tmp_path / "out", to, ends=EndBits(embeddings=embeddings, head=head))
    asked = {EMBED: embeddings, HEAD: head}
    assert done.ends == {name: bits for name, bits in asked.items() if bits}
    before, after = open_quantized(gptq), open_quantized(tmp_path / "out")
    for name in after:
        bits = asked.get(name.removesuffix(".weight"))
        value = after.read(name)
        assert torch.equal(value, expected(gptq, name.removesuffix(".weight"), bits) if bits else before.read(name))
    assert len(after.quantized) == len(before.quantized) + len(done.ends)
    assert verify(tmp_path / "out").ok


def test_eight_bits_lose_little_and_four_more(gptq: Path) -> None:
    weight = Checkpoint(gptq).read(f"{EMBED}.weight").float()
    errors = [float((expected(gptq, EMBED, bits) - weight).norm() / weight.norm()) for bits in (8, 4)]
    assert errors[0] < 0.01 < 0.05 < errors[1] < 0.15


def test_the_library_compressed_tensors_decodes_them(gptq: Path, tmp_path: Path) -> None:
    """It quantizes the modules that we did, and decodes their tensors to our weights."""
    convert(gptq, tmp_path / "out", CT, ends=EndBits(embeddings=8, head=4))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    model: Any = skeleton.open_model(tmp_path / "out")
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    reader = open_quantized(tmp_path / "out")
    schemes = {n: m.quantization_scheme for n, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    assert {f"{name}.weight" for name in schemes} == reader.quantized
    for module in (EMBED, HEAD):
        tensors = reader.tensors(f"{module}.weight")
        stored = tensors | {"weight_scale": tensors["weight_scale"].float()}  # its product is not rounded then
        theirs = PackedQuantizationCompressor.decompress(stored, schemes[module])["weight"]
        assert torch.equal(theirs, reader.read(f"{module}.weight")), module


@pytest.mark.parametrize(("embeddings", "head", "kinds"), [(8, 4, ("Q8_0", "Q4_0")), (4, None, ("Q4_0", "F16"))])
def test_the_package_gguf_decodes_them(
    gptq: Path, tmp_path: Path, embeddings: int, head: int | None, kinds: tuple[str, str]
) -> None:
    done = export(gptq, tmp_path / "out", ends=EndBits(embeddings=embeddings, head=head))
    file = tmp_path / "out" / done.file
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    found = [stored[name] for name in ("token_embd.weight", "output.weight")]
    assert tuple(t.tensor_type.name for t in found) == kinds
    for tensor, module, bits in zip(found, (EMBED, HEAD), (embeddings, head), strict=True):
        theirs = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))).float()
        ours = expected(gptq, module, bits) if bits else Checkpoint(gptq).read(f"{module}.weight").float()
        assert torch.equal(theirs, ours), module
    assert verify_gguf(file, source=gptq).ok


def test_tied_ends_stay_one_matrix_where_the_format_has_it(tied: Path, tmp_path: Path) -> None:
    done = export(tied, tmp_path / "gguf", ends=EndBits(embeddings=8))
    names = {t.name for t in gguf.GGUFReader(tmp_path / "gguf" / done.file).tensors}
    assert "token_embd.weight" in names
    assert "output.weight" not in names
    assert verify_gguf(tmp_path / "gguf" / done.file, source=tied).ok
    assert convert(tied, tmp_path / "mlx", "mlx", ends=EndBits(head=8)).ends == {EMBED: 8}, "whose head it is"
    assert verify(tmp_path / "mlx").ok


@pytest.mark.parametrize(
    ("to", "ends", "message"),
    [
        (CT, EndBits(embeddings=8), "only where they are two matrices.*mlx and gguf"),
        ("auto-round", EndBits(head=8), "a quantized head alone, of two matrices: compressed-tensors, mlx, gguf"),
        ("mlx", EndBits(embeddings=8, head=4), "one matrix: it cannot have 8 and 4 bits"),
    ],
)
def test_what_is_not_held_is_refused(tied: Path, tmp_path: Path, to: str, ends: EndBits, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert(tied, tmp_path / "out", to, ends=ends)
    assert not (tmp_path / "out").exists()


def test_ends_go_on_into_other_formats_as_they_are(gptq: Path, tmp_path: Path) -> None:
    convert(gptq, tmp_path / "ct", CT, ends=EndBits(embeddings=8, head=4))
    convert(tmp_path / "ct", tmp_path / "mlx", "mlx")
    one, other = open_quantized(tmp_path / "ct"), open_quantized(tmp_path / "mlx")
    for module in (EMBED, HEAD):
        assert torch.equal(one.read(f"{module}.weight"), other.read(f"{module}.weight"))
    assert export(tmp_path / "ct", tmp_path / "gguf").kinds["Q8_0"] == 1, "the embeddings"
    assert verify_gguf(next((tmp_path / "gguf").glob("*.gguf")), source=tmp_path / "ct").ok
    with pytest.raises(InputError, match="gptq has a quantized head alone"):
        convert(tmp_path / "ct", tmp_path / "gptq", "gptq")
    with pytest.raises(InputError, match=f"{EMBED} has 8 bits already"):
        convert(tmp_path / "ct", tmp_path / "again", "mlx", ends=EndBits(embeddings=4))


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ checkpoint whose head has a multiple of 32 rows, as those of real vocabularies have."""
    out = tmp_path_factory.mktemp("even")
    pico.save(pico.model(vocab_size=320, bos_token_id=0, eos_token_id=1), out / "model", torch.float16)
    make_tokenizer(out / "model")
    pico.packed(out / "model", out / "gptq", Grid(4, 32))
    return out / "gptq"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("to", ["gptq", "auto-round"])
def test_a_head_alone_is_quantized_where_engines_read_it(even: Path, tmp_path: Path, to: str, bits: int) -> None:
    """Said by `lm_head` or by settings of its own, read back, and taken into every other format."""
    done = convert(even, tmp_path / "one", to, ends=EndBits(head=bits))
    assert done.ends == {HEAD: bits}
    config = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    own = {"bits": bits, "group_size": 32, "sym": True}
    if to == "gptq":
        assert config["lm_head"] is True
        assert config.get("dynamic") == (None if bits == 4 else {f"+:^{HEAD}$": own})
    else:
        assert config["extra_config"] == {HEAD: own}
    assert verify(tmp_path / "one").ok
    for other in {CT, "mlx", "gptq", "auto-round"} - {to}:
        convert(tmp_path / "one", tmp_path / other, other)
        reader = open_quantized(tmp_path / other)
        assert f"{HEAD}.weight" in reader.quantized
        assert torch.equal(reader.read(f"{HEAD}.weight"), expected(even, HEAD, bits))
        assert f"{EMBED}.weight" not in reader.quantized
    assert export(tmp_path / "one", tmp_path / "gguf").kinds["Q8_0"] == (bits == 8)
    with pytest.raises(InputError, match=f"{to} has a quantized head alone"):
        convert(even, tmp_path / "both", to, ends=EndBits(embeddings=8, head=bits))


@pytest.mark.slow
def test_gptqmodel_reads_a_quantized_head(even: Path, tmp_path: Path) -> None:
    convert(even, tmp_path / "head", "gptq", ends=EndBits(head=8))
    command = [sys.executable, "-m", "helpers.load_gptqmodel", str(tmp_path / "head"), str(tmp_path / "seen")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    seen = load_file(tmp_path / "seen")
    ours = open_quantized(tmp_path / "head").read(f"{HEAD}.weight")
    assert torch.allclose(seen[HEAD].float(), ours, rtol=2**-10, atol=0)  # its weights are rounded to float16


def test_a_head_that_the_config_calls_quantized_is_quantized(even: Path, tmp_path: Path) -> None:
    shutil.copytree(even, tmp_path / "said")
    declared = json.loads((tmp_path / "said" / "quantize_config.json").read_text()) | {"lm_head": True}
    edit_json(tmp_path / "said" / "config.json", quantization_config=declared)
    (finding,) = verify(tmp_path / "said").findings
    assert (finding.where, finding.reason) == (f"{HEAD}.weight", "in 16 bit, the config says that this linear is 4-bit")


def test_codes_that_are_not_the_nearest_are_not_kept(
    gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = conversion.rounded_end

    def off_by_one(planned: Any, module: str) -> tuple[Tensor, Tensor, Tensor]:
        codes, scale, zero = right(planned, module)
        codes[3, 5] = 255 - codes[3, 5]
        return codes, scale, zero

    monkeypatch.setattr(conversion, "rounded_end", off_by_one)
    with pytest.raises(StageError, match=f"{EMBED}: what was converted does not decode to its source"):
        convert(gptq, tmp_path / "out", CT, ends=EndBits(embeddings=8))
    assert not (tmp_path / "out").exists()


def test_a_matrix_that_is_not_finite_is_named(gptq: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{EMBED}.weight"][2, 2] = float("nan")

    shutil.copytree(gptq, tmp_path / "bad")
    edit_tensors(tmp_path / "bad" / "model.safetensors", spoil)
    with pytest.raises(InputError, match=f"{EMBED}.weight has values that are not finite"):
        convert(tmp_path / "bad", tmp_path / "out", CT, ends=EndBits(embeddings=8))


def test_the_variant_ends_is_what_ships(gptq: Path, tmp_path: Path) -> None:
    """The model of a GPTQ checkpoint with rounded ends has the weights of the converted one."""
    convert(gptq, tmp_path / "ct", CT, ends=EndBits(embeddings=8, head=4))
    grids = TokenEnds.of(skeleton.open_model(gptq)).grids(EndBits(embeddings=8, head=4), 32)
    cpu = torch.device("cpu")
    ours = variants.quantized(gptq, device=cpu, dtype=torch.float32, ends=grids).state_dict()
    shipped = variants.quantized(tmp_path / "ct", device=cpu, dtype=torch.float32).state_dict()
    assert ours.keys() == shipped.keys()
    for name, value in ours.items():
        assert torch.equal(value, shipped[name]), name

"""A made-up format, one class and one entry of FORMATS, is written, verified and read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.e2e import edit_json, edit_tensors
from helpers.quantizing import GRID, model_dir, run
from torch import Tensor, nn

from requant.checkpoint.reader import Checkpoint, TensorInfo, read_json
from requant.deploy import verify
from requant.deploy.verification import Verification
from requant.evaluate import variants
from requant.formats.quantized_format import Finding, Packing, QuantizedFormat, Reader, SixteenBitEnds
from requant.formats.registry import FORMATS, load_quantized, open_quantized
from requant.quantize.plan import Settings

SUFFIXES = ("codes", "step", "middle")
MODULE = "model.layers.1.mlp.down_proj"


def shapes(
    rows: int, columns: int, bits: int, group_size: int, *, symmetric: bool = True
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    groups = columns // group_size
    return {
        "codes": ((rows, columns), torch.uint8),
        "step": ((rows, groups), torch.float32),
        "middle": ((rows, groups), torch.float32),
    }


def pack(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, *, symmetric: bool = True) -> dict[str, Tensor]:
    return {"codes": codes, "step": scale, "middle": zero}


def unpack(tensors: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, step, middle = (tensors[s] for s in SUFFIXES)
    columns, groups = codes.shape[1], step.shape[1]
    return codes, step, middle, torch.arange(columns, device=codes.device) // (columns // groups)


def dequantize(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    codes, step, middle, group = unpack(tensors, bits)
    return (codes.float() - middle[:, group]) * step[:, group]


def config(*, bits: int, group_size: int, symmetric: bool, **_: Any) -> dict[str, Any]:
    return {"quant_method": "plain", "bits": bits, "group_size": group_size, "sym": symmetric}


class PlainRules(SixteenBitEnds):
    def __init__(self, declared: Mapping[str, Any]) -> None:
        self.declared = declared

    def of(self, module: str, inner: str, linear: nn.Linear) -> Packing:
        return Packing(
            bits=self.declared["bits"],
            group_size=self.declared["group_size"],
            symmetric=self.declared["sym"],
            desc_act=False,
            rows=linear.out_features,
            columns=linear.in_features,
        )


class PlainReader:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.quantized = frozenset(f"{n.removesuffix('codes')}weight" for n in checkpoint if n.endswith(".codes"))

    def __iter__(self) -> Iterator[str]:
        others = (n for n in self.checkpoint if n.rpartition(".")[2] not in SUFFIXES)
        return iter([*self.quantized, *others])

    def __contains__(self, name: object) -> bool:
        return name in self.quantized or name in self.checkpoint

    def is_symmetric(self, weight: str, *, declared: bool) -> bool:
        return declared

    def tensors(self, weight: str, device: torch.device = torch.device("cpu")) -> dict[str, Tensor]:  # noqa: B008
        return {s: self.checkpoint.read(weight.removesuffix("weight") + s).to(device) for s in SUFFIXES}

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return unpack(tensors, 8)

    def unpack(
        self,
        weight: str,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.decode(self.tensors(weight, device))

    def read(self, name: str, device: torch.device = torch.device("cpu")) -> Tensor:  # noqa: B008
        return dequantize(self.tensors(name, device), 8) if name in self.quantized else self.checkpoint.read(name)

    def bits_and_group_size(self, weight: str) -> tuple[int, int]:
        declared = self.checkpoint.config["quantization_config"]
        return declared["bits"], declared["group_size"]


class PlainChecks:
    def config(self, declared: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
        if declared.get("bits") != 4:
            yield f"bits is {declared.get('bits')!r}, expected 4", False

    def header(self, suffix: str, info: TensorInfo | None, packing: Packing) -> str | None:
        shape, _ = shapes(packing.rows, packing.columns, packing.bits, packing.group_size)[suffix]
        return None if info is not None and info.shape == shape else f"expected {list(shape)}"

    def values(self, stem: str, tensors: Mapping[str, Tensor], packing: Packing, reader: Reader) -> Iterator[Finding]:
        if int(tensors["codes"].max()) >= 2**packing.bits:
            yield Finding(f"{stem}.codes", "a code is too large")

    def files(self, path: Path, declared: Mapping[str, Any]) -> Iterator[Finding]:
        yield from ()

    def zero_points(self, declared: Mapping[str, Any]) -> tuple[str, str]:
        return "middle", "zero points of another convention"


PLAIN = QuantizedFormat(
    name="plain",
    suffixes=SUFFIXES,
    codes="codes",
    shapes=shapes,
    pack=pack,
    unpack=unpack,
    dequantize=dequantize,
    config=config,
    config_file=None,
    recognise=lambda declared: declared.get("quant_method") == "plain",
    rules=PlainRules,
    reader=PlainReader,
    checks=PlainChecks(),
)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in the made-up format, beside its source `16bit`."""
    monkeypatch.setitem(FORMATS, "plain", PLAIN)
    run(model_dir(tmp_path), tmp_path / "plain", settings=Settings(grid=GRID, format="plain"))
    return tmp_path / "plain"


def test_what_is_written_decodes_to_the_weights_of_gptq(written: Path, tmp_path: Path) -> None:
    source = model_dir(tmp_path)
    run(source, tmp_path / "gptq", settings=Settings(grid=GRID))
    plain, gptq = dict(load_quantized(written)), dict(load_quantized(tmp_path / "gptq"))
    assert plain.keys() == gptq.keys()
    assert all(torch.equal(plain[n], gptq[n]) for n in plain)
    assert not (written / "quantize_config.json").exists()
    assert open_quantized(written).bits_and_group_size(f"{MODULE}.weight") == (4, 32)


def test_evaluation_reads_it(written: Path, tmp_path: Path) -> None:
    sources = variants.VariantSources.of_checkpoint(model_dir(tmp_path), gptq=written)
    model = variants.load("gptq", sources, device=torch.device("cpu"), dtype=torch.float32)
    weight = open_quantized(written).read(f"{MODULE}.weight")
    assert torch.equal(model.get_submodule(MODULE).weight, weight)


def test_it_is_verified(written: Path, tmp_path: Path) -> None:
    done = verify(written, source=model_dir(tmp_path))
    assert (*findings(done), done.linears) == (14,)
    (file,) = written.glob("*.safetensors")
    edit_tensors(file, lambda t: t | {f"{MODULE}.codes": t[f"{MODULE}.codes"] | 16})
    assert findings(verify(written)) == [f"{MODULE}.codes: a code is too large"]
    declared = read_json(written / "config.json")["quantization_config"]
    edit_json(written / "config.json", quantization_config=declared | {"bits": 3})
    assert findings(verify(written)) == ["config.json: quantization_config: bits is 3, expected 4"]


def findings(done: Verification) -> list[str]:
    """What is wrong, apart from the tokenizer that the small model lacks."""
    return [str(f) for f in done.findings if f.where != "tokenizer"]

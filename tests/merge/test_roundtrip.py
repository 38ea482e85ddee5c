"""Our checkpoints read by gptqmodel 7.7, the reference writer, and its checkpoints by us."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import one_thread
from helpers.loading import runtime_names
from safetensors.torch import load_file, save_file
from torch import Tensor

from requant import deploy
from requant.checkpoint.reader import Checkpoint
from requant.deploy import check_headers, check_tensors
from requant.formats import gptq as gptq_format
from requant.formats.registry import load_quantized
from requant.modeling import skeleton
from requant.numerics.grid import Grid, find_scales, round_to_grid

pytest.importorskip("gptqmodel")
BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128, -1)
ROWS, COLUMNS = 96, 256


def weight(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.02


def torch_linear(bits: int, group: int, sym: bool, desc_act: bool = False) -> Any:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return TorchLinear(
        bits=bits, group_size=group, sym=sym, desc_act=desc_act, in_features=COLUMNS, out_features=ROWS, bias=False,
        register_buffers=True,
    )  # fmt: skip


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_gptqmodel_decodes_ours(bits: int, group: int, sym: bool) -> None:
    """gptqmodel converts v1 to its inner format and multiplies in float16: 11 bits agree."""
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    grid = Grid(bits, group, symmetric=sym)
    w = weight()
    scales = find_scales(w, torch.ones(COLUMNS), grid)
    ours = gptq_format.pack(round_to_grid(w, scales, grid), scales.scale, scales.zero, bits)
    theirs = torch_linear(bits, group, sym)
    for name, tensor in ours.items():
        assert getattr(theirs, name).shape == tensor.shape
        getattr(theirs, name).copy_(tensor)
    convert_gptq_v1_to_v2_format_module(theirs, bits=bits, pack_dtype=torch.int32)
    theirs.post_init()
    decoded = theirs.dequantize_weight().float().T
    expected = gptq_format.dequantize(ours, bits)
    torch.testing.assert_close(decoded, expected, rtol=2**-10, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("desc_act", [False, True], ids=["plain", "desc_act"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_we_decode_gptqmodels(bits: int, group: int, sym: bool, desc_act: bool) -> None:
    """gptqmodel packs weights on a grid, with desc_act in any order; we read them exactly."""
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    grid = Grid(bits, group, symmetric=sym)
    w = weight(1)
    scales = find_scales(w, torch.ones(COLUMNS), grid)
    codes = round_to_grid(w, scales, grid)
    size = COLUMNS if group == -1 else group
    g_idx = torch.arange(COLUMNS) // size
    if desc_act:
        order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(2))
        g_idx, codes = g_idx[order], codes[:, order]
    expected = (codes.float() - scales.zero[:, g_idx]) * scales.scale[:, g_idx]
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = expected
    theirs = torch_linear(bits, group, sym, desc_act)
    theirs.pack_original(linear, scales.scale.clone(), scales.zero.clone(), g_idx.int().clone())
    convert_gptq_v2_to_v1_format_module(theirs, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    written = {name: getattr(theirs, name) for name in gptq_format.SUFFIXES}
    assert torch.equal(gptq_format.dequantize(written, bits), expected)


def by_gptqmodel(source: Path, out: Path, **options: Any) -> Path:
    """Quantized and saved by the library alone, with its tokenizer files beside."""
    from gptqmodel import GPTQModel, QuantizeConfig

    if options["group_size"] == -1:
        options["act_group_aware"] = False  # its default needs groups
    config = QuantizeConfig(device="cpu", **options)
    rows = [{"input_ids": r[None], "attention_mask": torch.ones_like(r[None])} for r in pico.ids(8, 32)]
    with torch.enable_grad():
        made = GPTQModel.load(str(source), config, dtype=torch.float32)
        made.quantize(rows, batch_size=4)
        made.save(str(out))
    for file in source.glob("tokenizer*"):
        if not (out / file.name).exists():
            shutil.copy(file, out)
    return out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 32, "sym": True, "desc_act": True},
        {"bits": 4, "group_size": 64, "sym": False, "desc_act": False},
        {"bits": 8, "group_size": -1, "sym": True, "desc_act": False},
        {"bits": 3, "group_size": 32, "sym": True, "desc_act": False},
    ],
    ids=["4 bit desc_act", "4 bit asym", "8 bit row", "3 bit"],
)
def test_a_whole_checkpoint_of_gptqmodel(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """verify passes its checkpoint, and we get the logits that its own loader computes.

    Its weights are close to the source's.
    """
    import transformers

    out = by_gptqmodel(source, tmp_path / "out", **options)
    found = check_headers.check(out)
    assert [f for f in found.findings if "path of the machine" not in f.reason] == []
    assert len(found.packed) == 14
    seen = check_tensors.check(found, Checkpoint(source))
    assert seen.findings == []
    assert (seen.relative_error or 9) < {3: 0.5, 4: 0.25, 8: 0.03}[options["bits"]]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        out, device_map={"": "cpu"}, dtype=torch.float32,
        quantization_config=transformers.GPTQConfig(bits=options["bits"], backend="gptq_torch"),
    ).eval()  # fmt: skip
    ids = pico.ids(2, 24)
    with one_thread():
        assert pico.relative(pico.logits(loaded, ids), pico.logits(ours(out), ids)) < 2**-10


def ours(path: Path) -> Any:
    """The model as `load_quantized` reads it, fp32."""
    made = skeleton.open_model(path)
    stored = dict(load_quantized(path))
    names = skeleton.tensor_names(made, stored)
    skeleton.place(made, {parameter: stored[name].float() for parameter, name in names.items()})
    made.tie_weights()
    return made


def by_its_loader(checkpoint: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Logits by gptqmodel's loader, in a process of its own.

    The loader replaces classes and weight conversions of transformers.
    """
    command = [sys.executable, "-m", "helpers.load_gptqmodel", str(checkpoint), str(out)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mixtral_is_kept_from_gptqmodel_by_names_alone(tmp_path: Path) -> None:
    """gptqmodel needs transformers 5's names, servers the original ones, which we write.

    For servers see tests/deploy/test_vllm.py.
    """
    model = pico.save(pico.model("mixtral"), tmp_path / "model", torch.float16)
    pico.save_tokenizer(model)
    out = tmp_path / "gptq"
    pico.packed(model, out, Grid(4, 32))
    expected = pico.logits(ours(out))
    refused = by_its_loader(out, tmp_path / "seen")
    assert refused.returncode == 1
    assert "model.layers.0.mlp.experts.0.down_proj.qweight" in refused.stderr.splitlines()[-1]
    save_file(runtime_names(load_file(out / "model.safetensors")), out / "model.safetensors", metadata={"format": "pt"})
    loaded = by_its_loader(out, tmp_path / "seen")
    assert loaded.returncode == 0, loaded.stderr
    assert pico.relative(load_file(tmp_path / "seen")["logits"], expected) < 5e-3, "float16"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_verify_finds_the_path_that_gptqmodel_leaves(source: Path, tmp_path: Path) -> None:
    """gptqmodel 7.7 writes a local temporary path into its metadata; nothing else is wrong."""
    out = by_gptqmodel(source, tmp_path / "out", bits=4, group_size=32, sym=True, desc_act=False)
    done = deploy.verify(out, source=source)
    assert [f.where for f in done.findings] == [
        "config.json: quantization_config.meta.offload_to_disk_path", "quantize_config.json: meta.offload_to_disk_path",
    ]  # fmt: skip
    for name in ("config.json", "quantize_config.json"):
        raw = json.loads((out / name).read_text())
        (raw.get("quantization_config") or raw)["meta"].pop("offload_to_disk_path")
        (out / name).write_text(json.dumps(raw))
    done = deploy.verify(out, source=source)
    assert done.ok, done.message()
    assert done.perplexity is not None

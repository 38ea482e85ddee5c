"""Our files in MLX: `pip install 'mlx[cpu]' mlx-lm`, then `pytest -m mlx`.

REQUANT_MLX_PYTHON names an interpreter that has both, where this one has not.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import pico
from helpers.e2e import edit_json, make_model, one_thread
from safetensors.torch import load_file

from requant.deploy import verify
from requant.deploy.conversion import convert
from requant.evaluate import variants
from requant.formats.registry import open_quantized
from requant.modeling.token_ends import EndBits
from requant.numerics.grid import Grid

PYTHON = os.environ.get("REQUANT_MLX_PYTHON") or (sys.executable if importlib.util.find_spec("mlx_lm") else None)
pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(PYTHON is None, reason="no MLX here: pip install 'mlx[cpu]' mlx-lm"),
]
ROWS = [[5, 17, 40, 3, 61, 9, 22, 14]]

# Runs in the interpreter that has MLX: its modules, what they were told, their weights in fp32, logits in fp32.
ASK = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model
model, _ = load_model(Path(sys.argv[1]))
told, found = {}, {}
for name, module in model.named_modules():
    if hasattr(module, "scales"):
        told[name] = [module.bits, module.group_size]
        scales, biases = (t.astype(mx.float32) for t in (module.scales, module.biases))
        found[name] = mx.dequantize(module.weight, scales, biases, group_size=module.group_size, bits=module.bits)
model.set_dtype(mx.float32)
found["logits"] = model(mx.array(json.loads(sys.argv[3]))).astype(mx.float32)
mx.save_safetensors(sys.argv[2], found)
print("TOLD", json.dumps(told))
"""


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_mlx_reads_each_module_with_our_settings_and_our_weights(tmp_path: Path, symmetric: bool) -> None:
    make_model(tmp_path / "model", hidden=64)
    overrides = (
        ("*.layers.1.mlp.*", {"bits": 8, "group_size": 64}),
        ("*.layers.0.self_attn.*", {"bits": 3, "group_size": 64}),
        ("*.layers.0.mlp.down_proj", {"bits": 2, "group_size": 128}),
        ("*.layers.0.mlp.up_proj", None),
    )
    grid = Grid(4, 32, symmetric=symmetric, signed=symmetric)
    pico.packed(tmp_path / "model", tmp_path / "gptq", grid, overrides=overrides)
    convert(tmp_path / "gptq", tmp_path / "out", "mlx")
    command = [str(PYTHON), "-P", "-c", ASK, str(tmp_path / "out"), str(tmp_path / "theirs.safetensors"), str(ROWS)]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOLD")).removeprefix("TOLD"))
    theirs, reader = load_file(tmp_path / "theirs.safetensors"), open_quantized(tmp_path / "out")
    logits = theirs.pop("logits")
    assert {f"{name}.weight" for name in theirs} == reader.quantized
    settings = {reader.bits_and_group_size(f"{name}.weight") for name in told}
    assert settings == {(8, 64), (3, 64), (2, 128), (4, 32)}
    for name, weight in theirs.items():
        assert tuple(told[name]) == reader.bits_and_group_size(f"{name}.weight"), name
        ours = reader.read(f"{name}.weight")
        assert torch.equal(weight, ours) if symmetric else torch.allclose(weight, ours, rtol=0, atol=1e-7), name
    model = variants.quantized(tmp_path / "out", device=torch.device("cpu"), dtype=torch.float32)
    with one_thread(), torch.no_grad():
        ours = model(input_ids=torch.tensor(ROWS)).logits
    assert torch.allclose(logits, ours, atol=1e-3 * float(ours.std()))


@pytest.mark.parametrize(("tied", "ends"), [(False, EndBits()), (True, EndBits(embeddings=8))], ids=["linears", "ends"])
def test_verify_with_mlx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, ends: EndBits) -> None:
    """mlx-lm's scores of every token are ours, with embeddings and head in one matrix of 8 bits too."""
    monkeypatch.setenv("REQUANT_MLX_PYTHON", str(PYTHON))
    make_model(tmp_path / "model", hidden=64, tied=tied)
    rope = {
        "rope_theta": 300.0,
        "rope_type": "default",
    }  # transformers' place for it, which mlx-lm's llama does not know
    edit_json(tmp_path / "model" / "config.json", rope_parameters=rope)
    pico.packed(tmp_path / "model", tmp_path / "gptq", Grid(4, 32, signed=True))
    convert(tmp_path / "gptq", tmp_path / "out", "mlx", ends=ends)
    with one_thread():
        proof = verify(tmp_path / "out", load_in=["mlx"])
    assert [str(finding) for finding in proof.findings] == []
    (engine,) = proof.engines
    assert engine["kernels"] == (["QuantizedEmbedding", "QuantizedLinear"] if ends else ["QuantizedLinear"])
    assert engine["dtype"] == "float32"
    assert engine["ok"]
    assert set(engine["versions"]) == {"mlx", "mlx-lm"}

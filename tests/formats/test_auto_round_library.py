"""Our files in AutoRound's library: `pip install auto-round`, then `pytest -m autoround`.

REQUANT_AUTO_ROUND_PYTHON names an interpreter that has it, where this one has not.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import make_model, one_thread
from safetensors.torch import load_file

from requant.deploy import engine_processes, verify
from requant.deploy.conversion import convert
from requant.formats.registry import open_quantized
from requant.numerics.grid import Grid

PYTHON = os.environ.get("REQUANT_AUTO_ROUND_PYTHON") or (
    sys.executable if importlib.util.find_spec("auto_round") else None
)
pytestmark = [
    pytest.mark.autoround,
    pytest.mark.skipif(PYTHON is None, reason="no AutoRound here: pip install auto-round"),
]

# Runs in the interpreter that has AutoRound: its modules, what they were told, and what they multiply an identity to.
ASK = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
told, weights = {}, {}
for name, module in model.named_modules():
    if hasattr(module, "qweight"):
        told[name] = [module.bits, module.group_size]
        module.scales = module.scales.float()  # so that its product is not rounded to fp16
        weights[name] = module(torch.eye(module.infeatures)).T.contiguous()
save_file(weights, sys.argv[2])
print("TOLD", json.dumps(told))
"""


def mixed(*, symmetric: bool) -> tuple[tuple[str, dict[str, Any] | None], ...]:
    """Settings of single modules, some of which have zero points unless all are symmetric."""
    return (
        ("*.layers.1.mlp.*", {"bits": 8, "group_size": -1, "symmetric": symmetric}),
        ("*.layers.0.self_attn.*", {"bits": 3, "group_size": 64}),
        ("*.layers.0.mlp.down_proj", {"bits": 2, "symmetric": symmetric}),
        ("*.layers.0.mlp.up_proj", None),
    )


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_library_reads_each_module_with_our_settings_and_our_weights(tmp_path: Path, symmetric: bool) -> None:
    make_model(tmp_path / "model", hidden=64)
    overrides = mixed(symmetric=symmetric)
    pico.packed(
        tmp_path / "model", tmp_path / "gptq", Grid(4, 32, signed=symmetric), overrides=overrides, dtype=torch.float32
    )
    convert(tmp_path / "gptq", tmp_path / "out", "auto-round")
    command = [str(PYTHON), "-P", "-c", ASK, str(tmp_path / "out"), str(tmp_path / "theirs.safetensors")]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"HF_HUB_OFFLINE": "1"}, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOLD")).removeprefix("TOLD"))
    theirs, reader = load_file(tmp_path / "theirs.safetensors"), open_quantized(tmp_path / "out")
    assert {f"{name}.weight" for name in theirs} == reader.quantized
    assert symmetric == any(bool((reader.unpack(weight)[1] < 0).any()) for weight in reader.quantized)
    assert len(theirs) == 13
    settings = {reader.bits_and_group_size(f"{name}.weight") for name in told}
    assert settings == {(8, 128), (8, 64), (3, 64), (2, 32), (4, 32)}
    for name, weight in theirs.items():
        assert tuple(told[name]) == reader.bits_and_group_size(f"{name}.weight"), name
        assert torch.equal(weight, reader.read(f"{name}.weight")), name


def test_verify_asks_transformers_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "model", hidden=64)
    pico.packed(tmp_path / "model", tmp_path / "gptq", Grid(4, 32, symmetric=False), overrides=mixed(symmetric=True))
    convert(tmp_path / "gptq", tmp_path / "out", "auto-round")
    monkeypatch.setenv(engine_processes.PYTHON.format("TRANSFORMERS"), str(PYTHON))
    with one_thread():
        done = verify(tmp_path / "out", load_in=["transformers"])
    assert [str(f) for f in done.findings] == []
    (engine,) = done.engines
    assert engine["versions"]["auto-round"]

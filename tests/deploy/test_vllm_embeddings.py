"""Quantized token embeddings of compressed-tensors in a real vLLM, its kernel interpreted.

Run by `make test-vllm`. vLLM's build for CPUs leaves Triton out; the lookup is the only kernel that is interpreted.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import pico
from helpers.e2e import make_model

from requant import deploy
from requant.deploy import engine_processes
from requant.deploy.conversion import convert
from requant.modeling.token_ends import EndBits
from requant.numerics.grid import Grid

PYTHON = engine_processes.interpreter("vllm", Path(__file__).resolve().parents[2])
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="no vLLM here: make setup-vllm"),
]
INTERPRETED = """
import os, runpy, sys
os.environ["TRITON_INTERPRET"] = "1"
import triton, triton.language
from vllm import triton_utils
given = triton_utils.triton, triton_utils.tl
triton_utils.triton, triton_utils.tl = triton, triton.language
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_embedding
triton_utils.triton, triton_utils.tl = given
sys.argv = [argument for argument in sys.argv[1:] if argument != "-P"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("bits", [8, 4])
def test_vllm_looks_tokens_up_in_quantized_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    make_model(tmp_path / "model", hidden=256)
    pico.packed(tmp_path / "model", tmp_path / "gptq", Grid(4, 64), dtype=torch.bfloat16)
    convert(tmp_path / "gptq", tmp_path / "ct", "compressed-tensors", ends=EndBits(embeddings=bits))
    start, python = tmp_path / "start.py", tmp_path / "python"
    start.write_text(INTERPRETED)
    python.write_text(f'#!/bin/sh\nexec "{PYTHON}" "{start}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("REQUANT_VLLM_PYTHON", str(python))
    done = deploy.verify(tmp_path / "ct", load_in=["vllm"])
    assert done.ok, done.message()
    row = done.engines[0]
    assert "CompressedTensorsEmbeddingWNA16Int" in row["kernels"]
    assert abs(row["difference"]) < engine_processes.TOLERANCE["bfloat16"]

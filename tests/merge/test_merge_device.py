"""`requant.merge.stage` on a GPU: read ahead, decode and fold there in full fp32.

Skipped without a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from safetensors.torch import load_file

from requant import merge
from requant.adapters import peft_directory
from requant.merge.plan import MergePlan
from requant.merge.stage import compute, computed_ahead
from requant.numerics import nf4
from requant.run import prepare

CPU = torch.device("cpu")
GPU = pytest.mark.gpu


def planned(tmp: Path, **lora: Any) -> MergePlan:
    """A LoRA on a base in NF4 with nested scales."""
    made = pico.model()
    source = pico.save(made, tmp / "source", torch.bfloat16)
    base = pico.save_4bit(source, tmp / "base", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    pico.train(made, tmp / "adapter", **lora)
    return prepare.plan_merge(base, [peft_directory.load(tmp / "adapter")], None, trust_remote_code=False)[0]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "blocksize"), [((64, 64), 64), ((33, 51), 64), ((5, 7), 128), ((1, 3), 64)])
def test_a_device_decodes_the_same_bits(quant_type: Any, shape: tuple[int, int], blocksize: int) -> None:
    """The device's decoder on the CPU: partial rows, short last blocks, odd counts."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed, absmax = nf4.encode(weight, quant_type, blocksize)
    state = nf4.QuantState(quant_type=quant_type, blocksize=blocksize, shape=shape, dtype="float32")
    table = nf4.table(quant_type)
    byte = torch.arange(256)
    pairs = torch.stack([table[byte >> 4], table[byte & 15]], dim=1)
    assert torch.equal(nf4._decode_on_device(packed, pairs, absmax, state), nf4.decode(packed, absmax, state))


def test_reading_ahead_gives_the_same_tensors_in_full_precision(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for (op, value, changes), expected in zip(computed_ahead(plan, plan.ops, CPU), plan.ops, strict=True):
            assert torch.get_float32_matmul_precision() == "highest"
            expected_value, changed = compute(plan, expected)
            assert op is expected
            assert changes == changed
            assert torch.equal(value, expected_value)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@GPU
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_gpu_writes_what_the_cpu_writes(tmp_path: Path, lora: dict[str, Any]) -> None:
    """Decoded tensors bit for bit; folded ones to the order of fp32 sums, far below TF32."""
    plan = planned(tmp_path, **lora)
    for name in ("cpu", "cuda"):
        (tmp_path / name).mkdir()
        merge.merge(plan, tmp_path / name, dtype="float32", device=torch.device(name))
    on_gpu, on_cpu = (load_file(tmp_path / n / "model.safetensors") for n in ("cuda", "cpu"))
    for op in plan.ops:
        if op.folds:
            torch.testing.assert_close(on_gpu[op.name], on_cpu[op.name], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(on_gpu[op.name], on_cpu[op.name]), op.name

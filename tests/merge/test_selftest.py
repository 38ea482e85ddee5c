"""`requant.merge.selftest` passes what was merged and finds any later change of the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import pico

from requant import merge
from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint
from requant.errors import StageError
from requant.merge.plan import MergePlan
from requant.merge.selftest import self_test
from requant.run import prepare

NAME = "model.layers.1.self_attn.v_proj.weight"


def merged(tmp: Path, dtype: str, *, packed: bool = False, **lora: object) -> tuple[MergePlan, Path]:
    made = pico.model()
    base = pico.save(made, tmp / "base", torch.bfloat16)
    if packed:
        base = pico.save_4bit(base, tmp / "packed", bnb_4bit_quant_type="nf4")
    pico.train(made, tmp / "adapter", **lora)
    plan = prepare.plan_merge(base, peft_directory.load(tmp / "adapter"), None, trust_remote_code=False)[0]
    (tmp / "out").mkdir()
    merge.merge(plan, tmp / "out", dtype=dtype)  # type: ignore[arg-type]
    return plan, tmp / "out"


def flip(out: Path, row: int, column: int, bit: int) -> None:
    """Flip one bit of one element in the file (bit 0 is the least of the mantissa)."""
    info = Checkpoint(out)[NAME]
    size = info.dtype.itemsize
    offset = info.offset + (row * info.shape[1] + column) * size + bit // 8
    with info.file.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ (1 << bit % 8)]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.filterwarnings("ignore")
def test_a_merge_is_within_its_bound_but_not_by_much(
    tmp_path: Path, dtype: str, packed: bool, lora: dict[str, object]
) -> None:
    """The worst of thousands of roundings is near half a unit: the bound is not too wide."""
    plan, out = merged(tmp_path, dtype, packed=packed, **lora)
    tested = self_test(plan, out, tensors=100, rows=8)
    assert tested.worst <= 1
    assert tested.rows == 8 * tested.tensors
    assert tested.worst > 0.2 or dtype == "float32"


@pytest.mark.parametrize(("dtype", "exponent"), [("float16", 11), ("bfloat16", 8), ("float32", 24)])
def test_an_exponent_bit_flipped_in_the_file_is_caught(tmp_path: Path, dtype: str, exponent: int) -> None:
    plan, out = merged(tmp_path, dtype)
    flip(out, 13, 40, exponent)
    with pytest.raises(
        StageError, match=rf"{NAME} row 13 differs from base \+ adapter by .* times the allowed rounding"
    ):
        self_test(plan, out, tensors=100, rows=1000)


@pytest.mark.parametrize(("dtype", "bit"), [("float16", 4), ("bfloat16", 2), ("float32", 9)])
def test_a_mantissa_error_of_a_few_units_is_caught(tmp_path: Path, dtype: str, bit: int) -> None:
    """2^bit units in the last place, for every element of a column: far above one rounding."""
    plan, out = merged(tmp_path, dtype)
    for row in range(16):
        flip(out, row, 5, bit)
    with pytest.raises(StageError, match=NAME):
        self_test(plan, out, tensors=100, rows=1000)


def test_a_wrong_scaling_is_caught(tmp_path: Path) -> None:
    plan, out = merged(tmp_path, "float16")
    pico.edit_adapter(tmp_path / "adapter", lora_alpha=7)
    other = prepare.plan_merge(
        tmp_path / "base", peft_directory.load(tmp_path / "adapter"), None, trust_remote_code=False
    )[0]
    with pytest.raises(StageError, match="differs from base"):
        self_test(other, out)
    assert self_test(plan, out).worst <= 1


def test_a_nan_is_caught(tmp_path: Path) -> None:
    plan, out = merged(tmp_path, "float32")
    pico.edit_tensors(out / "model.safetensors", change={NAME: lambda t: t * float("nan")})
    with pytest.raises(StageError, match="differs"):
        self_test(plan, out, tensors=100)


def test_a_missing_tensor_is_caught(tmp_path: Path) -> None:
    plan, out = merged(tmp_path, "float32")
    pico.edit_tensors(out / "model.safetensors", drop=[NAME])
    with pytest.raises(StageError, match="holds 20 tensors, the plan has 21"):
        self_test(plan, out)


def test_an_adapter_of_norms_only_is_tested_too(tmp_path: Path) -> None:
    """Replaced vectors are changed tensors too: the self-test must test something."""
    plan, out = merged(tmp_path, "float32", target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    name = "model.layers.0.input_layernorm.weight"
    pico.edit_tensors(out / "model.safetensors", change={name: lambda t: t + 1})
    with pytest.raises(StageError, match=name):
        self_test(plan, out, tensors=100, rows=1000)


def test_the_sample_is_seeded(tmp_path: Path) -> None:
    plan, out = merged(tmp_path, "bfloat16")
    assert self_test(plan, out, tensors=2, rows=2, seed=1) == self_test(plan, out, tensors=2, rows=2, seed=1)
    assert (self_test(plan, out, tensors=2, rows=3).tensors, self_test(plan, out, tensors=2, rows=3).rows) == (2, 6)

"""`requant.adapters.weight_files`: shards with an index are read, and what is lost is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import pico
from safetensors.torch import load_file, save_file

from requant.adapters import peft_directory
from requant.adapters.weight_files import INDEX, WEIGHTS
from requant.errors import InputError

SHARD = "adapter_model-0000{}-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    pico.train(pico.model(), tmp_path / "adapter")
    return shard(tmp_path / "adapter")


def shard(adapter: Path) -> Path:
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        save_file({n: tensors[n] for n in part}, adapter / SHARD.format(number))
        weight_map |= dict.fromkeys(part, SHARD.format(number))
    (adapter / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return adapter


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        peft_directory.load(path)
    return str(caught.value)


def test_shards_are_one_adapter(sharded: Path, tmp_path: Path) -> None:
    pico.train(pico.model(), tmp_path / "whole")
    assert peft_directory.load(sharded).folds.keys() == peft_directory.load(tmp_path / "whole").folds.keys()


def edit_map(adapter: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((adapter / INDEX).read_text())
    change(index["weight_map"])
    (adapter / INDEX).write_text(json.dumps(index))


def without_shard(adapter: Path) -> None:
    (adapter / SHARD.format(2)).unlink()


def without_index(adapter: Path) -> None:
    (adapter / INDEX).unlink()


def name_too_many(adapter: Path) -> None:
    edit_map(adapter, lambda names: names.update({"base_model.model.lost.lora_A.weight": SHARD.format(1)}))


def name_too_few(adapter: Path) -> None:
    edit_map(adapter, lambda names: names.popitem())


def outside(adapter: Path) -> None:
    edit_map(adapter, lambda names: names.update(dict.fromkeys(names, "../other.safetensors")))


def stray_shard(adapter: Path) -> None:
    save_file({"x": torch.ones(1)}, adapter / "adapter_model-00003-of-00003.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_shard, f"1 of 2 shards are missing: {SHARD.format(2)}: copy them too"),
        (without_index, f"{INDEX}: missing, but {SHARD.format(1)} is there"),
        (name_too_many, "1 tensors are not in the shards that it names, e.g. 'base_model.model.lost.lora_A.weight'"),
        (name_too_few, "does not name 1 tensors of the shards, e.g. 'base_model.model.model.layers.1"),
        (outside, "in '../other.safetensors', expected a .safetensors file in the same directory"),
        (stray_shard, "does not name adapter_model-00003-of-00003.safetensors, which is there"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_shards_are_named(sharded: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(sharded)
    assert says in refused(sharded)


@pytest.mark.parametrize("keys", [("lora_",), ("lora_B",), ("layers.1.self_attn.v_proj.lora_A",)])
def test_tensors_without_elements_are_of_zero_3(tmp_path: Path, keys: tuple[str, ...]) -> None:
    pico.train(pico.model(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    emptied = {n: torch.empty(0) if any(k in n for k in keys) else t for n, t in tensors.items()}
    save_file(emptied, tmp_path / WEIGHTS)
    count = sum(t.numel() == 0 for t in emptied.values())
    message = refused(tmp_path)
    assert f"{WEIGHTS}: {count} of 8 tensors have no elements, e.g. " in message
    assert "zero_to_fp32.py" in message
    assert "stage3_gather_16bit_weights_on_model_save" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_whole_numbers_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    pico.train(pico.model(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first].to(dtype)}, tmp_path / WEIGHTS)
    assert f"{first!r} is {str(dtype).removeprefix('torch.')}, expected floating point" in refused(tmp_path)

"""`requant.adapters.kinds`: a made-up kind takes one class and one line.

It is loaded, planned, merged and self-tested.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from safetensors.torch import load_file, save_file
from torch import Tensor

from requant.adapters import fp64, kinds, peft_directory
from requant.adapters.fold import Fold, read
from requant.adapters.kinds import Kind
from requant.adapters.module_tensors import ModuleTensors, TensorKey, parameters
from requant.checkpoint.reader import Checkpoint, TensorInfo
from requant.errors import InputError, StageError

MODULE = "model.layers.1.mlp.down_proj"
TENSORS = {"outer_row": TensorKey(has_weight=True), **parameters("outer_column"), "outer_gain": TensorKey(shared=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer(Fold):
    """W + gain * column @ row, the gain shared by all modules."""

    row: TensorInfo
    column: TensorInfo
    gain: TensorInfo
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.column.shape[0], self.row.shape[0])

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.row, self.column)

    def apply(self, weight: Tensor) -> bool:
        delta = torch.outer(read(self.column), read(self.row)) * read(self.gain) * self.scaling
        weight.add_(delta)
        return bool(delta.any())

    def bound(self, largest: float) -> float:
        return largest + abs(self.scaling) * float(
            read(self.column).abs().max() * read(self.row).abs().max() * read(self.gain).abs()
        )

    def exact_rows(self, rows: Tensor, index: list[int]) -> fp64.Exact:
        left = fp64.read64(self.column)[index][:, None] * fp64.read64(self.gain)
        out, bound = fp64.add_product(rows, left, fp64.read64(self.row)[None], self.scaling)
        return fp64.Exact(out, bound * 2)


class TwiceTheDelta(Outer):
    """A wrong formula in `apply`, a right one in `exact_rows`."""

    def apply(self, weight: Tensor) -> bool:
        Outer.apply(self, weight)
        return Outer.apply(self, weight)


def kind(fold: type[Outer] = Outer) -> Kind:
    def build(tensors: ModuleTensors) -> Fold:
        row, column = tensors.exactly("outer_row", "outer_column")
        gain = tensors.shared["outer_gain"]
        return fold(
            module=tensors.module, row=row, column=column, gain=gain, scaling=tensors.config.scaling(tensors.module)
        )

    def why_not_merged(config: Mapping[str, Any]) -> str | None:
        return "spin is set: it turns" if config.get("spin") else None

    settings = frozenset({"r", "alpha", "temper"})
    return Kind(build=build, tensors=TENSORS, settings=settings, why_not_merged=why_not_merged)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """(base, adapter) on disk, the adapter spelled as PEFT would."""
    base = pico.save(pico.model(), tmp_path / "base")
    folder = tmp_path / "adapter"
    folder.mkdir()
    torch.manual_seed(3)
    tensors = {
        f"base_model.model.{MODULE}.outer_row.weight": torch.randn(128) * 0.1,
        f"base_model.model.{MODULE}.outer_column": torch.randn(64) * 0.1,
        "base_model.outer_gain": torch.tensor([1.75]),
    }
    save_file(tensors, folder / peft_directory.WEIGHTS)
    (folder / peft_directory.CONFIG).write_text(
        json.dumps({"peft_type": "OUTER", "r": 2, "alpha": 3, "temper": "mild"})
    )
    return base, folder


def test_a_kind_is_one_class_and_one_line(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = files
    monkeypatch.setitem(kinds.KINDS, "OUTER", kind())
    plan, result, tested = pico.merged(base, folder, tmp_path / "out")
    tensors = {k.rpartition("outer_")[2]: v.double() for k, v in load_file(folder / peft_directory.WEIGHTS).items()}
    before, after = Checkpoint(base), Checkpoint(tmp_path / "out")
    name = f"{MODULE}.weight"
    delta = 1.5 * tensors["gain"] * torch.outer(tensors["column"], tensors["row.weight"])
    assert torch.allclose(after.read(name).double(), before.read(name).double() + delta, rtol=0, atol=1e-6)
    assert float(delta.abs().max()) > 1e-2
    assert all(torch.equal(after.read(n), before.read(n)) for n in before if n != name)
    assert result.ledger["adapter"] == {"consumed": 3, "folds": 1, "replaced": 0}
    assert [op.name for op in plan.ops if op.folds] == [name]
    assert (tested.tensors, tested.rows) == (1, 4)
    assert tested.worst <= 1


def test_its_self_test_catches_a_wrong_formula(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kinds.KINDS, "OUTER", kind(TwiceTheDelta))
    with pytest.raises(StageError, match=f"{MODULE}.weight row .* differs from base"):
        pico.merged(*files, tmp_path / "out")


def test_what_it_does_not_understand_is_refused(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = files
    with pytest.raises(InputError, match="peft_type is 'OUTER', which is unknown here"):
        peft_directory.load(folder)
    monkeypatch.setitem(kinds.KINDS, "OUTER", kind())
    assert peft_directory.load(folder).folds[MODULE].shape == (64, 128)
    pico.edit_adapter(folder, feedforward_modules=["down_proj"])
    with pytest.raises(InputError, match="unknown settings feedforward_modules"):
        peft_directory.load(folder)
    pico.edit_adapter(folder, feedforward_modules=None, spin=True)
    with pytest.raises(InputError, match=r"adapter_config\.json: spin is set: it turns"):
        peft_directory.load(folder)
    pico.edit_adapter(folder, spin=None)
    pico.edit_tensors(folder / peft_directory.WEIGHTS, drop=[f"base_model.model.{MODULE}.outer_column"])
    with pytest.raises(InputError, match=f"{MODULE} has outer_row; expected outer_row, outer_column"):
        peft_directory.load(folder)

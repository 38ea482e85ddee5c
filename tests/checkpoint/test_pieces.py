"""Pieces of stacked tensors: the same values as slicing the whole, in any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from requant.checkpoint.pieces import Piece, PiecewiseCheckpoint
from requant.checkpoint.reader import Checkpoint

STACKED = torch.arange(3 * 4 * 6, dtype=torch.float32).reshape(3, 4, 6)


def opened(path: Path, **pieces: Piece) -> PiecewiseCheckpoint:
    save_file({"a": torch.ones(5), "stacked": STACKED, "z": torch.zeros(2)}, path / "model.safetensors")
    return PiecewiseCheckpoint(Checkpoint(path), pieces)


@pytest.mark.parametrize("index", range(3))
def test_a_run_of_rows_is_read_from_its_place(tmp_path: Path, index: int) -> None:
    piece = Piece(stacked="stacked", index=index, shape=(2, 6), first=2)
    view = opened(tmp_path, p=piece)
    assert view.contiguous("p")
    assert torch.equal(view.read("p"), STACKED[index, 2:])
    assert torch.equal(piece.of(STACKED), STACKED[index, 2:])
    assert view["p"].shape == (2, 6)
    assert view["p"].nbytes == 2 * 6 * 4


def test_a_selection_is_read_through_its_entry(tmp_path: Path) -> None:
    piece = Piece(stacked="stacked", index=1, shape=(3, 4), select=lambda entry: entry[:, 1::2].T)
    view = opened(tmp_path, p=piece)
    assert not view.contiguous("p"), "no loader may read it by its place"
    assert torch.equal(view.read("p"), STACKED[1][:, 1::2].T)
    assert view.read("p").is_contiguous()
    assert torch.equal(piece.of(STACKED), view.read("p"))


def test_whole_tensors_keep_their_names(tmp_path: Path) -> None:
    view = opened(tmp_path, p=Piece(stacked="stacked", index=0, shape=(4, 6)))
    assert list(view) == ["a", "stacked", "z", "p"]
    assert torch.equal(view.read("stacked"), STACKED)
    assert view.contiguous("a")

"""Files of scores: what `save` wrote comes back, anything else is named."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from helpers import reports
from safetensors.numpy import load_file, save_file

from requant_eval.errors import EvaluationError
from requant_eval.scoring.token_scores import FORMAT, TokenScores

META = {"format": FORMAT, "digest": "d", "nonfinite": "0", "seconds": "1.0"}


def test_a_changed_byte_never_passes(tmp_path: Path) -> None:
    """Every flip in the header and 200 at random places are refused: a wrong score would be a wrong report."""
    file, draw = tmp_path / "s.safetensors", Random(7)
    reports.scores(0.1, documents=5).save(file)
    whole = file.read_bytes()
    loaded = TokenScores.load(file)
    header = 8 + int.from_bytes(whole[:8], "little")
    flips = [(place, bit) for place in range(header) for bit in range(8)]
    flips += [(draw.randrange(len(whole)), draw.randrange(8)) for _ in range(200)]
    for place, bit in flips:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        with pytest.raises(EvaluationError, match=r"s\.safetensors: "):
            TokenScores.load(file)
    file.write_bytes(whole)
    assert np.array_equal(TokenScores.load(file).nll, loaded.nll)


@pytest.mark.parametrize(
    ("columns", "meta", "message"),
    [
        ({}, META, "no nll"),
        ({"nll": np.zeros(3)}, META, "no document"),
        (
            {"nll": np.zeros(3, np.float32), "document": np.zeros(3, np.int32), "top1": np.zeros(3, bool)},
            META,
            "float32",
        ),
        ({"nll": np.zeros(3), "document": np.zeros(2, np.int32), "top1": np.zeros(3, bool)}, META, "document is int32"),
        (
            {"nll": np.zeros(3), "document": np.zeros(3, np.int32), "top1": np.zeros(3, bool)},
            META | {"nonfinite": "x"},
            "damaged",
        ),
        (
            {"nll": np.zeros(3), "document": np.zeros(3, np.int32), "top1": np.zeros(3, bool)},
            {"format": FORMAT},
            "damaged",
        ),
    ],
)
def test_what_no_save_wrote_is_named(
    columns: dict[str, np.ndarray], meta: dict[str, str], message: str, tmp_path: Path
) -> None:
    save_file(columns, tmp_path / "s.safetensors", meta)
    with pytest.raises(EvaluationError, match=message):
        TokenScores.load(tmp_path / "s.safetensors")


def test_scores_without_a_checksum_are_damaged(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    reports.scores(0.1, documents=5).save(file)
    save_file(load_file(file), file, META)
    with pytest.raises(EvaluationError, match="no checksum"):
        TokenScores.load(file)

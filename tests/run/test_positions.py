"""Windows longer than a model's positions are refused by check where the model has a table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import copied, edit_json, recipe

from requant.errors import InputError
from requant.modeling import skeleton
from requant.run import positions, prepare
from requant.run.prepared import Prepared

pytestmark = pytest.mark.filterwarnings("ignore")


def mine(project: Path, tmp: Path, kind: str, target: str, **changes: Any) -> Path:
    """The project with a base of another kind."""
    out = copied(project, tmp)
    for part in ("base", "original", "adapter"):
        (out / part).unlink()
    base = pico.save(pico.model(kind, vocab_size=300, **changes), out / "base", torch.bfloat16)
    for file in (project / "original").glob("tokenizer*"):
        shutil.copy(file, base)
    pico.train(pico.reload(base), out / "adapter", target_modules=[target])
    return out


def prepared(project: Path, **changes: Any) -> Prepared:
    nf4 = {"quant_type": "nf4", "double_quant": False}
    variants = ["adapter", "merged", "gptq"]
    rest = {"base": {"model": "./base", "nf4": nf4}, "evaluate.variants": variants}
    return prepare.prepare(recipe(project, Path("runs"), rest | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"calibration.length": 80},
            "calibration.length 80: gpt2 has 64 positions: set calibration.length to at most 64",
        ),
        ({"evaluate.window": 70, "evaluate.sets.0.document_tokens": None}, "evaluate.window 70: gpt2 has 64 positions"),
        ({"heal": {"steps": 2, "batch": 2, "length": 96}}, "heal.length 96: gpt2 has 64 positions"),
    ],
)
def test_a_table_of_positions_is_not_exceeded(
    project: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    """It would be an index error of torch, after the merge."""
    out = mine(project, tmp_path / "p", "gpt2", "c_attn")
    fits = prepared(out)
    assert all(len(row.ids) <= 64 for rows in fits.texts.probes.values() for row in rows)
    with pytest.raises(InputError, match=named):
        prepared(out, **changes)


def test_rotary_positions_go_on_with_a_warning(project: Path, tmp_path: Path) -> None:
    out = mine(project, tmp_path / "p", "llama", "q_proj", max_position_embeddings=48)
    warnings = prepared(out).warnings
    assert "calibration.length is 64: llama has 48 positions, beyond them it was not trained" in warnings
    edit_json(out / "base" / "config.json", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})
    assert not [w for w in prepared(out).warnings if "positions" in w]


TABLES = {"gpt2": True, "opt": True, "llama": False, "gpt_neox": False, "gemma3_text": False, "falcon": False}


@pytest.mark.parametrize(("kind", "table"), TABLES.items())
def test_which_models_have_a_table(kind: str, table: bool) -> None:
    model: Any = skeleton.build(pico.config(kind))
    found = skeleton.positions(model.config)
    assert found == 64
    assert positions.has_table(model, found) == table

"""`requant.run.calibration_size`: too few tokens for the widths, and how many to use."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.e2e import recipe

from requant.recipe.text_sections import Calibration, Data
from requant.run import prepare
from requant.run.calibration_size import too_few_tokens

SHAPES = {"a.q_proj": (576, 576), "a.down_proj": (576, 1536), "a.o_proj": (576, 1024)}


def said(samples: int, length: int) -> list[str]:
    return too_few_tokens(Calibration(data=Data(path="a.txt"), samples=samples, length=length), SHAPES)


def test_fewer_tokens_than_inputs_are_a_warning_with_the_number_to_use() -> None:
    assert said(8, 128) == [
        "calibration: 8 x 128 = 1,024 tokens, and 1 of 3 linears have more inputs (up to 1,536): their Hessians have not "
        "full rank. Use 16 tokens for each input: samples: 192 with length: 128 (24,576 tokens)"
    ]
    assert "2 of 3 linears have more inputs" in said(1, 1023)[0]
    assert said(192, 128) == said(12, 128) == []


@pytest.mark.parametrize(("samples", "warned"), [(1, True), (2, False)])
def test_prepare_says_it(project: Path, samples: int, warned: bool) -> None:
    """The model has 128 inputs at most; a window has 64 tokens."""
    plan = prepare.prepare(recipe(project, Path("runs"), {"calibration.samples": samples}))
    assert any("have not full rank" in w for w in plan.warnings) is warned

"""Layers that share one block, as in Zamba: an adapter on copies fits no checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import pico, tiny

from requant.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")


def test_an_adapter_on_copies_is_refused_with_the_reason_and_one_beside_them_merged(tmp_path: Path) -> None:
    made = tiny.model("zamba2")
    base = pico.save(made, tmp_path / "base", torch.bfloat16)
    pico.train(made, tmp_path / "both", target_modules=["o_proj"])
    with pytest.raises(
        InputError, match=r"changes 1 weights that layers share, e\.g\. model\.layers\.3\..*o_proj\.weight, which is "
        r"model\.layers\.1\..*o_proj\.weight: .*Zamba2ForCausalLM can hold: train with these modules left out"
    ):  # fmt: skip
        pico.merged(base, tmp_path / "both", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for layer in (1, 3):  # PEFT trains one copy, and the file's matrix is both
        pico.train(tiny.model("zamba2"), tmp_path / f"{layer}", target_modules=rf".*layers\.{layer}\..*o_proj")
        with pytest.raises(InputError, match=r"changes 1 weights that layers share, .* or one alone"):
            pico.merged(base, tmp_path / f"{layer}", tmp_path / "out")
    made = tiny.model("zamba2")
    pico.train(made, tmp_path / "beside", target_modules=["in_proj"])
    _, _, tested = pico.merged(base, tmp_path / "beside", tmp_path / "out")
    assert tested.worst <= 1

"""ERNIE 4.5 VL: routers that a file holds transposed or joined; one list of experts for two."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import pico, tiny
from helpers.merging import FP32, ledger
from helpers.sweep import ids

from requant.checkpoint.reader import Checkpoint, read_json
from requant.evaluate import variants
from requant.modeling import skeleton, stored_parameters
from requant.numerics.grid import Grid
from requant.quantize.plan import Settings
from requant.quantize.stage import quantize

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")
MIXTURE = "model.language_model.layers.1.mlp"
FILE = "model.layers.1.mlp"


def ernie(tmp: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
    """A tiny model whose routers have a bias, and its files."""
    made = tiny.model("ernie4_5_vl_moe")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("e_score_correction_bias"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    return made, pico.save(made, tmp / "base", dtype)


def test_a_skeleton_filled_from_the_file_is_transformers_model_on_text_and_images(tmp_path: Path) -> None:
    made, base = ernie(tmp_path)
    stored = Checkpoint(base)
    assert stored[f"{FILE}.gate.weight"].shape == (64, 4), "[inputs, experts]: the class has it transposed"
    assert stored[f"{FILE}.moe_statics.e_score_correction_bias"].shape == (2, 4)
    model: Any = skeleton.open_model(base)
    names = skeleton.tensor_names(model, stored)
    assert names.keys() == {name for name, _ in model.named_parameters()}
    assert sorted(names.values()) == sorted(set(names.values())), "no tensor twice"
    assert stored_parameters.transposed(model) == {f"{MIXTURE}.{half}.gate" for half in ("text_moe", "vision_moe")}
    filled: Any = variants.fill(model, stored, CPU, torch.float32)
    assert pico.relative(pico.logits(filled, ids()), pico.logits(made, ids())) < FP32

    generator = torch.Generator().manual_seed(3)
    hidden, images = torch.randn(2, 6, 64, generator=generator), torch.tensor([[0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 0]])
    ours, theirs = (m.get_submodule(MIXTURE)(hidden, moe_mm_token_type_ids=images) for m in (filled, made))
    assert pico.relative(ours[0], theirs[0]) < FP32
    text = made.get_submodule(MIXTURE)(hidden)[0]
    assert pico.relative(text, theirs[0]) > 100 * FP32, "images have experts of their own"
    first = made.get_submodule(f"{MIXTURE}.vision_moe.experts").gate_up_proj[1]
    gate = filled.get_submodule(f"{MIXTURE}.vision_moe.experts.1.gate_proj").weight
    assert torch.equal(gate, first[: len(gate)])
    assert names[f"{MIXTURE}.vision_moe.experts.1.gate_proj.weight"] == f"{FILE}.experts.5.gate_proj.weight"


def test_adapters_on_experts_of_both_halves_and_on_routers(tmp_path: Path) -> None:
    made, base = ernie(tmp_path)
    targets = [
        f"{half}.experts.{leaf}" for half in ("text_moe", "vision_moe") for leaf in ("gate_up_proj", "down_proj")
    ]
    pico.train(
        made, tmp_path / "adapter", target_modules=["o_proj"], target_parameters=[*targets, "text_moe.gate.weight"]
    )
    live = peft.PeftModel.from_pretrained(pico.reload(base), tmp_path / "adapter").merge_and_unload()
    plan, result, tested = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert tested.worst <= 1
    ledger(plan, result)
    assert set(Checkpoint(tmp_path / "out")) == set(Checkpoint(base)), "the file's names"
    merged, before = pico.reload(tmp_path / "out").state_dict(), pico.reload(base).state_dict()
    changed = 0
    for name, value in live.state_dict().items():
        assert pico.relative(merged[name].double(), value.double()) < FP32 or torch.equal(merged[name], value), name
        changed += not torch.equal(merged[name], before[name])
    assert changed == 2 + 4 + 1, "o_proj of two blocks, four stacks of experts, one router"


@pytest.mark.slow
def test_experts_of_images_stay_in_16_bit_and_engines_are_told(tmp_path: Path) -> None:
    _, base = ernie(tmp_path, torch.float16)
    for layout in ("gptq", "compressed-tensors"):
        (tmp_path / layout).mkdir()
        settings = Settings(grid=Grid(8, 32), format=layout)
        plan, results = quantize(base, tmp_path / layout, ids(), settings, dtype=torch.float16, device=CPU, batch=2)
        assert {r.name for r in results} == set(plan.grids)
        assert {n for n in plan.grids if "_moe." in n} == {
            f"{MIXTURE}.text_moe.experts.{i}.{role}_proj" for i in range(4) for role in ("gate", "up", "down")
        }
    written, source = Checkpoint(tmp_path / "gptq"), Checkpoint(base)
    experts = {n.removesuffix(".qweight") for n in written if n.endswith(".qweight") and ".experts." in n}
    assert experts == {f"{FILE}.experts.{i}.{role}_proj" for i in range(4) for role in ("gate", "up", "down")}
    same = [f"{FILE}.experts.6.up_proj.weight", f"{FILE}.gate.weight_1", f"{FILE}.moe_statics.e_score_correction_bias"]
    assert all(torch.equal(written.read(n), source.read(n)) for n in same)

    # what vLLM's ernie45_vl_moe.py calls these modules
    rules = read_json(tmp_path / "gptq" / "config.json")["quantization_config"]["dynamic"]
    said = [rule.removeprefix("-:") for rule in rules if rule.startswith("-:")]
    ignored = read_json(tmp_path / "compressed-tensors" / "config.json")["quantization_config"]["ignore"]
    ignored = [rule.removeprefix("re:") for rule in ignored]
    inside = "language_model.model.layers.1.mlp"
    for patterns in (said, ignored):
        assert any(re.match(rule, f"{inside}.vision_experts") for rule in patterns)
        assert not any(re.match(rule, f"{inside}.text_experts") for rule in patterns)
    for router in ("text_experts_gate", "vision_experts_gate"):
        assert any(re.match(rule, f"{inside}.{router}") for rule in ignored), (
            "compressed-tensors goes by the class Linear"
        )

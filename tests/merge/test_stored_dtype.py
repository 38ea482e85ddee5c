"""The dtype of a merged checkpoint is one in which the model runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import pico
from helpers.e2e import copied, edit_json, edit_tensors, recipe, run

from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError, StageError
from requant.evaluate.finite_forward import first_overflow
from requant.merge import stored_dtype
from requant.merge.stored_dtype import choose_dtype
from requant.modeling.families import NEEDS_BFLOAT16
from requant.run import prepare

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore")


def base_of(tmp: Path, dtype: torch.dtype, kind: str = "llama") -> tuple[Path, Path]:
    base = pico.save(pico.model(kind), tmp / "base", dtype)
    pico.train(pico.reload(base), tmp / "adapter")
    return base, tmp / "adapter"


def chosen(base: Path, adapter: Path, asked: str = "auto") -> tuple[str, str]:
    plan, _ = prepare.plan_merge(base, peft_directory.load(adapter), None, trust_remote_code=False)
    return choose_dtype(plan, asked)


@pytest.mark.parametrize(
    ("stored", "expected", "why"),
    [
        (torch.bfloat16, "bfloat16", "the base's own dtype"),
        (torch.float16, "float16", "the base's own dtype; no weight can exceed"),
        (torch.float32, "bfloat16", "has the range of the base's float32"),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_auto_is_the_bases_own_dtype(
    tmp_path: Path, stored: torch.dtype, expected: str, why: str, declared: bool
) -> None:
    """Also where the config does not say it: then most of the stored values do."""
    base, adapter = base_of(tmp_path, stored)
    if not declared:
        edit_json(base / "config.json", dtype=None)
    assert chosen(base, adapter)[0] == expected
    assert chosen(base, adapter)[1].startswith(why)
    checkpoint = Checkpoint(base)
    assert stored_dtype.expected_dtype(checkpoint, "auto") == getattr(torch, expected)
    assert stored_dtype.serving_dtype(checkpoint) == getattr(torch, expected)


def test_a_4_bit_base_keeps_the_dtype_of_its_rest(tmp_path: Path) -> None:
    source = pico.save(pico.model(), tmp_path / "source", torch.bfloat16)
    base = pico.save_4bit(source, tmp_path / "base", bnb_4bit_quant_type="nf4")
    pico.train(pico.model(), tmp_path / "adapter")
    assert chosen(base, tmp_path / "adapter") == ("bfloat16", "the base's own dtype")


def test_a_float16_copy_of_a_family_that_overflows_is_stored_in_bfloat16(tmp_path: Path) -> None:
    base, adapter = base_of(tmp_path, torch.float16, "gemma2")
    assert chosen(base, adapter) == ("bfloat16", "the activations of gemma2 exceed float16's 65504")
    assert stored_dtype.serving_dtype(Checkpoint(base)) == torch.bfloat16


def test_the_families_are_model_types_of_transformers() -> None:
    assert set(transformers.CONFIG_MAPPING) >= NEEDS_BFLOAT16


def test_float16_is_refused_in_a_text_config_too() -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    assert stored_dtype.overflows_in_float16(config) == "gemma3"
    assert stored_dtype.overflows_in_float16({"model_type": "x", "text_config": config["text_config"]}) == "gemma3_text"
    assert stored_dtype.overflows_in_float16({"model_type": "llama", "text_config": None}) is None


@pytest.mark.parametrize("key", ["merge.dtype", "quantize.dtype", "evaluate.dtype"])
def test_check_refuses_float16_where_the_model_does_not_run_in_it(project: Path, tmp_path: Path, key: str) -> None:
    mine = copied(project, tmp_path / "p", "adapter")
    for part in ("base", "original"):
        (mine / part).unlink()
    base = pico.save(pico.model("gemma2", vocab_size=300), mine / "base", torch.bfloat16)
    for file in (project / "original").glob("tokenizer*"):
        (base / file.name).write_bytes(file.read_bytes())
    pico.train(pico.reload(base), mine / "adapter")
    changes: dict[str, Any] = {
        "base": {"model": "./base", "nf4": "none"},
        "evaluate.variants": ["base", "adapter", "merged", "gptq"],
    }
    fine = prepare.prepare(recipe(mine, tmp_path, changes | {"merge.dtype": "auto"}))
    assert fine.dtypes == "merged in bfloat16 (the base's own dtype), served in bfloat16"
    with pytest.raises(InputError, match=f"{key}: float16: the activations of gemma2 exceed float16's range"):
        prepare.prepare(recipe(mine, tmp_path, changes | {"merge.dtype": "auto", key: "float16"}))


def overflowing(project: Path, tmp: Path) -> Path:
    """A project whose base has small weights and activations beyond float16: two norms are near its end."""
    mine = copied(project, tmp, "base")

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        large = {
            n: torch.full_like(t, 3e4) for n, t in tensors.items() if n.endswith("post_attention_layernorm.weight")
        }
        return tensors | large

    edit_tensors(mine / "base" / "model.safetensors", change)
    return mine


@pytest.mark.parametrize("key", ["merge.dtype", "quantize.dtype"])
def test_float16_that_was_asked_for_is_proven_by_one_forward(project: Path, tmp_path: Path, key: str) -> None:
    """Every weight fits float16, what the model computes does not: no checkpoint is left that gives NaN."""
    mine = overflowing(project, tmp_path / "p")
    changes = {"merge.dtype": "auto", key: "float16"}
    with pytest.raises(
        StageError, match=rf"NaN or infinity from model\.layers\.0 on: .* set {key}( and quantize\.dtype)? to bfloat16"
    ):
        run(mine, tmp_path / "runs", changes, until="merge")
    assert not (tmp_path / "runs" / "pico" / "merged").exists()
    run(mine, tmp_path / "runs", {"merge.dtype": "auto"}, until="merge")
    config = json.loads((tmp_path / "runs" / "pico" / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_the_proof_is_told(project: Path, tmp_path: Path) -> None:
    outcome = run(project, tmp_path, {"merge.dtype": "float16"}, until="merge")
    stages = json.loads((outcome.path / ".stages.json").read_text())
    why = stages["merge"]["result"]["why"]
    assert why == "asked for in the recipe; one forward of 32 tokens in float16 is finite"


def test_where_a_forward_overflows(tmp_path: Path) -> None:
    made = pico.model()
    good = pico.save(made, tmp_path / "good", torch.float16)
    assert first_overflow(good, pico.ids(1, 16), dtype=torch.float16, device=CPU) is None
    with torch.no_grad():
        made.model.norm.weight.fill_(6e4)
        made.lm_head.weight.mul_(50)
    head = pico.save(made, tmp_path / "head", torch.float16)
    assert first_overflow(head, pico.ids(1, 16), dtype=torch.float16, device=CPU) == "the output embedding"
    with torch.no_grad():
        made.model.layers[1].mlp.down_proj.weight.mul_(3e4)
        made.model.layers[1].mlp.up_proj.weight.mul_(3e3)
    block = pico.save(made, tmp_path / "block", torch.float16)
    assert first_overflow(block, pico.ids(1, 16), dtype=torch.float16, device=CPU) == "model.layers.1"
    assert first_overflow(block, pico.ids(1, 16), dtype=torch.bfloat16, device=CPU) is None


def test_check_says_that_float16_will_be_proven(project: Path, tmp_path: Path) -> None:
    found = prepare.prepare(recipe(project, tmp_path, {"merge.dtype": "auto", "quantize.dtype": "float16"})).dtypes
    assert found == (
        "merged in bfloat16 (the base's own dtype), served in float16, if one forward in float16 is finite"
    )

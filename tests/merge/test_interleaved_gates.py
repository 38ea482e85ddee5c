"""Inkling: gate and up row by row in turns in the file, of MLPs and all experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import pico, tiny
from helpers.merging import FP32, ledger
from helpers.sweep import ids

from requant.checkpoint.reader import Checkpoint
from requant.evaluate import streamed, variants
from requant.modeling import skeleton, stacked_experts
from requant.numerics.grid import Grid
from requant.quantize.plan import Settings
from requant.quantize.stage import quantize

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")
LAYERS = "model.language_model.layers"
FILE = "model.llm.layers"


def inkling(tmp: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
    """A tiny model of a dense block and one of experts, and its files."""
    made = tiny.model("inkling_mm_model")
    return made, pico.save(made, tmp / "base", dtype)


def test_a_skeleton_filled_from_the_file_is_transformers_model(tmp_path: Path) -> None:
    made, base = inkling(tmp_path)
    stored = Checkpoint(base)
    gates = {n: info.shape for n, info in stored.items() if "w13" in n}
    assert gates == {
        f"{FILE}.0.mlp.w13_dn.weight": (256, 64),
        f"{FILE}.1.mlp.experts.w13_weight": (4, 256, 64),
        f"{FILE}.1.mlp.shared_experts.shared_w13_weight": (1, 256, 64),
    }
    model: Any = skeleton.open_model(base)
    names = skeleton.tensor_names(model, stored)
    assert names.keys() == {name for name, _ in model.named_parameters()}
    assert len(set(names.values())) == len(names), "no tensor twice"
    filled: Any = variants.fill(model, stored, CPU, torch.float32)
    assert pico.relative(pico.logits(filled, ids()), pico.logits(made, ids())) < FP32
    for name in ("0.mlp.gate_proj.weight", "0.mlp.up_proj.weight", "1.mlp.experts.gate_up_proj",
                 "1.mlp.shared_experts.gate_proj", "1.mlp.shared_experts.up_proj"):  # fmt: skip
        owner, _, leaf = f"{LAYERS}.{name}".rpartition(".")
        ours, theirs = (getattr(m.get_submodule(owner), leaf) for m in (filled, made))
        assert torch.equal(ours, theirs), name


def test_single_experts_are_pieces_of_the_stack(tmp_path: Path) -> None:
    made, base = inkling(tmp_path)
    model, pieces = stacked_experts.open_split(base)
    filled: Any = variants.fill(model, pieces, CPU, torch.float32)
    assert pico.relative(pico.logits(filled, ids()), pico.logits(made, ids())) < FP32
    whole = made.get_submodule(f"{LAYERS}.1.mlp.experts").gate_up_proj[2]
    assert torch.equal(pieces.read(f"{FILE}.1.mlp.experts.2.gate_proj.weight"), whole[:128])
    assert torch.equal(pieces.read(f"{FILE}.1.mlp.experts.2.up_proj.weight"), whole[128:])


@pytest.mark.parametrize("half", ["gate_proj", "up_proj"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_adapters_on_gate_and_up_are_merged_into_the_files_rows(
    tmp_path: Path, half: str, options: dict[str, Any]
) -> None:
    made, base = inkling(tmp_path)
    pico.train(
        made,
        tmp_path / "adapter",
        target_modules=[f"{LAYERS}.0.mlp.gate_proj", f"{LAYERS}.0.mlp.up_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj", f"shared_experts.{half}"],
        **options,
    )
    live = peft.PeftModel.from_pretrained(pico.reload(base), tmp_path / "adapter").merge_and_unload()
    plan, result, tested = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    assert tested.worst <= 1
    ledger(plan, result)
    assert set(Checkpoint(tmp_path / "out")) == set(Checkpoint(base)), "the file's names"
    merged, before = pico.reload(tmp_path / "out").state_dict(), pico.reload(base).state_dict()
    changed = set()
    for name, value in live.state_dict().items():
        assert pico.relative(merged[name].double(), value.double()) < FP32 or torch.equal(merged[name], value), name
        changed |= set() if torch.equal(merged[name], before[name]) else {name.removeprefix(f"{LAYERS}.")}
    assert changed == {
        "0.mlp.gate_proj.weight", "0.mlp.up_proj.weight", "1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj",
        f"1.mlp.shared_experts.{half}",
    }  # fmt: skip


def test_the_file_is_quantized_under_its_own_names(tmp_path: Path) -> None:
    """The dense matrix as one, its rows in the file's order; experts one by one; shared ones as they are."""
    _, base = inkling(tmp_path, torch.float16)
    (tmp_path / "gptq").mkdir()
    settings = Settings(grid=Grid(8, 32))
    plan, results = quantize(base, tmp_path / "gptq", ids(), settings, dtype=torch.float16, device=CPU, batch=2)
    assert {r.name for r in results} == set(plan.grids)
    written, source = Checkpoint(tmp_path / "gptq"), Checkpoint(base)
    packed = {n.removesuffix(".qweight") for n in written if n.endswith(".qweight") and ".mlp." in n}
    assert packed == {f"{FILE}.0.mlp.w13_dn", f"{FILE}.0.mlp.w2_md"} | {
        f"{FILE}.1.mlp.experts.{i}.{role}_proj" for i in range(4) for role in ("gate", "up", "down")
    }
    shared = f"{FILE}.1.mlp.shared_experts.shared_w13_weight"
    assert torch.equal(written.read(shared), source.read(shared))
    ours = variants.quantized(tmp_path / "gptq", device=CPU, dtype=torch.float32)
    assert pico.relative(pico.logits(ours, ids()), pico.logits(pico.reload(base), ids())) < 0.05, "8 bits"
    dense = ours.get_submodule(f"{LAYERS}.0.mlp")
    rows = torch.stack((dense.gate_proj.weight, dense.up_proj.weight), dim=1).flatten(0, 1)
    assert pico.relative(rows, source.read(f"{FILE}.0.mlp.w13_dn.weight").float()) < 0.02


def test_an_unmerged_adapter_runs_block_by_block(tmp_path: Path) -> None:
    """PEFT puts a tensor of the class's order in the place of the file's, and takes it out again."""
    made, base = inkling(tmp_path)
    pico.train(
        made,
        tmp_path / "adapter",
        target_modules=[f"{LAYERS}.0.mlp.gate_proj", f"{LAYERS}.0.mlp.up_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    live = peft.PeftModel.from_pretrained(pico.reload(base), tmp_path / "adapter").eval()
    plan, *_ = pico.merged(base, tmp_path / "adapter", tmp_path / "out")
    sources = variants.VariantSources(
        base=base, adapter=tmp_path / "adapter", merged=tmp_path / "out", gptq=base, plan=plan, sixteen_bit=True
    )
    walk = streamed.walk_of("adapter", sources, device=CPU, dtype=torch.float32)
    model = streamed.StreamedModel(walk)
    for seed in (7, 8):
        assert pico.relative(model(input_ids=ids(seed)).logits, pico.logits(live, ids(seed))) < FP32

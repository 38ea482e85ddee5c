"""`requant.run.served_experts`: only experts that some server reads are quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico, tiny
from helpers.sweep import RESULTS
from run.test_encoded_bases import project, recipe
from torch import nn
from transformers import PretrainedConfig

from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.writer import Slot
from requant.deploy import engine_support
from requant.deploy.engine_classes import UNSPLIT
from requant.deploy.engine_targets import TARGETS
from requant.modeling import linears, skeleton
from requant.modeling.families import EXPERT
from requant.numerics.grid import Grid
from requant.quantize.plan import Settings, plan
from requant.run import prepare, served_experts

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """gpt-oss, which no server reads with quantized experts, and a Qwen 3 MoE, which all do."""
    made = {"experts": project(tmp_path_factory.mktemp("experts"), "experts")}
    return made | {f"gpt-oss {n}": project(tmp_path_factory.mktemp("oss"), "mxfp4", hidden_size=n) for n in (64, 128)}


@pytest.mark.parametrize(
    ("kind", "asked", "quantized"),
    [
        ("gpt-oss 128", "auto", False),
        ("gpt-oss 128", "skip", False),
        ("gpt-oss 128", "quantize", True),
        ("gpt-oss 64", "auto", False),
        ("experts", "auto", True),
        ("experts", "quantize", True),
        ("experts", "skip", False),
    ],
)
def test_experts_that_no_server_reads_stay_in_16_bit(
    bases: dict[str, Path], tmp_path: Path, kind: str, asked: str, quantized: bool
) -> None:
    prepared = prepare.prepare(recipe(bases[kind], tmp_path, **{"quantize.experts": asked}))
    grids = prepared.quantize.plan.grids
    assert any(EXPERT.fullmatch(n) for n in grids) == quantized
    assert "model.layers.0.self_attn.q_proj" in grids
    vllm: Any = next(v for v in prepared.quantize.engines if v.target.name == "vllm")
    assert ("experts in 16 bit" in vllm.remarks) == (not quantized)
    refused = [p for p in vllm.problems if "passes over single experts" in p]
    assert bool(refused) == (kind != "experts" and quantized)
    said = [w for w in prepared.warnings if "no server reads experts of GptOssForCausalLM quantized (vLLM" in w]
    assert len(said) == (kind != "experts" and asked == "auto")
    if said:
        assert said[0].startswith("the experts, ")
        assert "quantize.experts: quantize quantizes them all the same" in said[0]
        assert vllm.loads == (kind == "gpt-oss 128"), (
            "64: it asks for its kernel before it asks whether they are quantized"
        )
        assert said[0].endswith("serve it as compressed-tensors: add that to output.formats") != vllm.loads
    sglang: Any = next(v for v in prepared.quantize.engines if v.target.name == "sglang")
    assert any("whatever the rules say" in p for p in sglang.problems) == (not quantized)


def test_a_format_that_is_written_needs_no_advice(bases: dict[str, Path], tmp_path: Path) -> None:
    both = {"output.formats": ["gptq", "compressed-tensors"]}
    prepared = prepare.prepare(recipe(bases["gpt-oss 64"], tmp_path, **both))
    vllm: Any = next(v for v in prepared.quantize.engines if v.target.name == "vllm")
    assert vllm.loads
    assert [w for w in prepared.warnings if w.endswith("quantize.experts: quantize quantizes them all the same")]


def test_where_no_server_reads_them_in_16_bit_either_they_are_quantized(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_experts, "_is_served", lambda *_: False)
    prepared = prepare.prepare(recipe(bases["gpt-oss 64"], tmp_path))
    assert any(EXPERT.fullmatch(n) for n in prepared.quantize.plan.grids)
    assert [w for w in prepared.warnings if w.endswith("and none in 16 bit: serve the merged checkpoint")]


def test_a_run_without_quantized_experts_is_another_run(bases: dict[str, Path], tmp_path: Path) -> None:
    """What is left is part of the plan, which the key of the stage is made of."""
    auto, every = (
        prepare.prepare(recipe(bases["gpt-oss 128"], tmp_path, **{"quantize.experts": asked})).quantize.plan
        for asked in ("auto", "quantize")
    )
    assert auto.grids.keys() < every.grids.keys()
    stacked = [s for s in auto.slots if s.name.endswith("experts.gate_up_proj")]
    assert [len(s.shape) for s in stacked] == [3, 3], "under the one name that servers read in 16 bit"


def test_a_class_that_no_server_has_is_no_reason() -> None:
    class Unheard(nn.Module):
        config = PretrainedConfig()

    assert engine_support.why_no_experts(Unheard(), TARGETS.values()) is None


@pytest.mark.parametrize(
    ("kind", "count", "says"),
    [
        (
            "dbrx",
            6,
            "6 stacked expert weights stay in 16 bit, e.g. transformer.blocks.0.ffn.experts.mlp.w1: SGLang 0.5.23 re",
        ),
        ("jetmoe", 8, "mlp.input_linear.weight: vLLM 0.33.0 runs them by transformers' code"),
        (
            "inkling_text",
            6,
            "mlp.shared_experts.gate_proj: vLLM 0.33.0 builds them in 16 bit, and gptqmodel 7.7 leaves",
        ),
    ],
)
def test_experts_in_forms_that_nobody_reads_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, count: int, says: str
) -> None:
    """The reason is the servers', by the class that holds them; a class without one is told so."""
    model = skeleton.build(tiny.config(kind), split=True)
    (sentence,) = served_experts.left_fused(model)
    assert sentence.startswith(f"{count} stacked expert weights stay in 16 bit, e.g. ")
    assert says in sentence
    monkeypatch.setattr(served_experts, "UNSPLIT", {})
    (sentence,) = served_experts.left_fused(model)
    assert sentence.endswith("so that no server is known to read them quantized")


def test_every_type_of_the_sweep_with_experts_in_16_bit_has_a_reason() -> None:
    kinds = [row["kind"] for row in json.loads(RESULTS.read_text()) if row["fused"]]
    assert kinds
    for kind in kinds:
        model = skeleton.build(tiny.config(kind), split=True)
        owners = {type(model.get_submodule(n.rpartition(".")[0])).__name__ for n in linears.left_fused(model)}
        assert owners
        assert owners <= UNSPLIT.keys()


@pytest.mark.parametrize(("server", "loads"), [("vllm", False), ("sglang", True)])
def test_experts_that_a_server_always_builds_in_16_bit(tmp_path: Path, server: Any, loads: bool) -> None:
    """DBRX: SGLang's layers have no quantized experts, so that the rules do not matter; vLLM's loader stops."""
    base = pico.save(tiny.model("dbrx", d_model=128), tmp_path)
    model: Any = skeleton.open_model(base)
    slots = {n: Slot(n, torch.bfloat16, i.shape) for n, i in Checkpoint(base).items()}
    made = plan(slots, model, Settings(grid=Grid(4, 32)), torch.bfloat16, where=base)
    got = engine_support.judge(made, model, TARGETS[server])
    assert got.loads == loads, got.problems
    assert "experts in 16 bit" in got.remarks

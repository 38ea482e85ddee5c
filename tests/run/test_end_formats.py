"""`quantize.embeddings` and `quantize.head`: refused early, written, scored as they ship."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.e2e import make_model, recipe, run

from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.writer import Slot
from requant.deploy import engine_support, engine_targets
from requant.errors import InputError, RecipeError
from requant.formats.registry import open_quantized
from requant.modeling import skeleton
from requant.modeling.token_ends import EndBits, TokenEnds, other_tables
from requant.numerics.grid import Grid
from requant.run import output_formats, prepare
from requant.run.end_formats import PlannedEnds, planned_ends
from requant.run.prepared import Prepared

CT = "compressed-tensors"
EMBED, HEAD = "model.embed_tokens", "lm_head"
BOTH = {"quantize.embeddings": 8, "quantize.head": 4}


def prepared(project: Path, changes: dict[str, Any]) -> Prepared:
    return prepare.prepare(recipe(project, Path("runs"), changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantize.embeddings": 8}, r"no format of output\.formats holds it quantized: gptq holds embeddings"),
        (
            {"quantize.head": 4, "output.formats": ["gptq", "auto-round"]},
            r"auto-round holds embeddings and head in 16 bit",
        ),
    ],
)
def test_bits_that_no_format_holds_are_refused_before_any_work(
    project: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        prepared(project, changes)


def test_a_variant_that_is_not_made_is_refused(project: Path) -> None:
    with pytest.raises(RecipeError, match=r"ends is made with quantize\.embeddings or quantize\.head"):
        recipe(project, Path("runs"), {"evaluate.variants": ["adapter", "merged", "gptq", "ends"]})


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", ("adapter", "merged", "ends")), (["adapter", "gptq", "ends"], ("adapter", "gptq", "ends"))],
)
def test_tasks_are_run_on_what_ships(tmp_path: Path, asked: Any, expected: tuple[str, ...]) -> None:
    """Their gates judge the variant ends."""
    changes = BOTH | {"output.formats": ["gptq", CT], "evaluate.task_variants": asked}
    of: Any = SimpleNamespace(
        recipe=recipe(tmp_path, Path("runs"), changes), heal=None,
        quantize=SimpleNamespace(ends=PlannedEnds(grids={EMBED: Grid(8, 32)})),
        variants=("base", "adapter", "merged", "rtn", "gptq", "ends"),
    )  # fmt: skip
    task_variants: Any = Prepared.task_variants
    assert task_variants.fget(of) == expected
    with pytest.raises(RecipeError, match=r"task_variants\.1: ends is made with quantize\.embeddings"):
        recipe(tmp_path, Path("runs"), {"evaluate.task_variants": ["adapter", "ends"]})


def test_ends_that_the_merge_unties_are_two_matrices(tmp_path: Path) -> None:
    """The base's class ties them; an adapter with a head of its own makes two."""
    make_model(tmp_path / "tied", tied=True)
    model: Any = skeleton.open_model(tmp_path / "tied")
    stored = [Slot(f"{name}.weight", torch.bfloat16, (300, 64)) for name in (EMBED, HEAD)]
    layout: Any = SimpleNamespace(slots=stored)
    made = recipe(tmp_path, Path("runs"), {"quantize.head": 8, "output.formats": ["gptq", CT, "mlx"]})
    assert planned_ends(made, model, layout).weights == {EMBED: f"{EMBED}.weight"}
    two = planned_ends(made, model, layout, untied=True)
    assert two.weights == {HEAD: f"{HEAD}.weight"}
    assert two.formats == (CT, "mlx")


def test_formats_that_keep_16_bit_are_told(project: Path) -> None:
    p = prepared(project, BOTH | {"output.formats": ["gptq", "auto-round", CT, "gguf"]})
    assert p.quantize.ends.formats == (CT, "gguf")
    assert [w for w in p.warnings if w.startswith("output.formats: auto-round holds embeddings and head in 16 bit")]
    assert p.variants[-1] == "ends"
    plain, ended = p.quantize.plan, p.quantize.ends.added_to(p.quantize.plan, CT)
    assert p.quantize.ends.added_to(plain, "auto-round") is plain
    assert output_formats.stored_bytes(ended, CT) < output_formats.stored_bytes(plain, CT)


def test_the_table_of_engines_knows_what_reads_them(project: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "model", hidden=64)
    model: Any = skeleton.open_model(tmp_path / "model")
    p = prepared(project, BOTH | {"output.formats": ["gptq", CT, "gguf"]})
    plan = p.quantize.ends.added_to(p.quantize.plan, CT)
    targets = engine_targets.TARGETS
    verdicts = {n: engine_support.judge(plan, model, targets[n], CT) for n in ("vllm", "sglang")}  # type: ignore[index]
    assert not [p for p in verdicts["vllm"].problems if EMBED in p], "its Llama hands the config on"
    assert [p for p in verdicts["sglang"].problems if f"takes {EMBED} for a 16-bit one" in p]
    model.config.architectures = ["BloomForCausalLM"]
    refused = engine_support.judge(plan, model, engine_targets.TARGETS["vllm"], CT)
    assert [p for p in refused.problems if f"BloomForCausalLM takes {EMBED} for a 16-bit one" in p]


def test_ends_of_a_model(tmp_path: Path) -> None:
    make_model(tmp_path / "tied", tied=True)
    make_model(tmp_path / "two")
    tied, two = (TokenEnds.of(skeleton.open_model(tmp_path / name)) for name in ("tied", "two"))
    assert (tied.matrices, two.matrices) == ((EMBED,), (EMBED, HEAD))
    assert {n: g.bits for n, g in tied.grids(EndBits(head=8), 32).items()} == {EMBED: 8}
    assert {n: (g.bits, g.search) for n, g in two.grids(EndBits(embeddings=8, head=4), 32).items()} == {
        EMBED: (8, "minmax"),
        HEAD: (4, "hessian"),
    }
    assert two.grids(EndBits(embeddings=8, group_size=64), 32)[EMBED].group_size == 64
    assert other_tables(skeleton.open_model(tmp_path / "two"), {}) == (EMBED,)


@pytest.mark.slow
def test_a_run_scores_what_ships(finished: Path, project: Path, ran: Path) -> None:
    """Linears are not solved again; the formats hold the ends; the report has what they cost, and the card says so."""
    asked = BOTH | {"output.formats": ["gptq", CT, "mlx"]}
    out = run(project, ran, asked)
    assert out.ran == [CT, "mlx", "evaluate", "report"]
    one, other = open_quantized(out.path / CT), open_quantized(out.path / "mlx")
    assert {f"{EMBED}.weight", f"{HEAD}.weight"} <= one.quantized == other.quantized
    assert f"{EMBED}.weight" in Checkpoint(out.path / "gptq")
    report = json.loads((out.path / "report.json").read_text())
    for s in report["sets"]:
        edges = {(e["from"], e["to"]): e["kind"] for e in s["edges"]}
        assert edges["gptq", "ends"] == "ends"
        assert edges["adapter", "ends"] == "total"
        assert "ends" in {v["name"] for v in s["variants"]}
    assert "with 8-bit embeddings and 4-bit head" in report["headline"]
    assert report["facts"]["formats"][CT]["ends"] == {EMBED: 8, HEAD: 4}
    assert report["facts"]["cost"]["bytes"]["ends"] == report["facts"]["formats"][CT]["bytes"]
    card = (out.path / CT / "README.md").read_text()
    assert f"{EMBED} is rounded to 8 bits" in card.replace("\\_", "_")
    assert "rounding of embeddings and head" in (out.path / "report.md").read_text()
    assert "with 8-bit embeddings" not in (out.path / "gptq" / "README.md").read_text()
    assert run(project, ran, asked).ran == []

"""`requant.run.merge_onto`: the base whose merge has the lower held-out loss is taken."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers import e2e

from requant.evaluate import merge_onto_probe
from requant.run import merge_onto, onto_choice, prepare, runner
from requant.run.shared_inputs import SharedInputs
from requant.run.stage_results import OntoDecision
from requant_eval.render import html, markdown

FEW = {"evaluate.variants": ["adapter", "merged"], "heal": "off"}
AUTO: dict[str, Any] = FEW | {"merge.onto": "auto"}
pytestmark = pytest.mark.filterwarnings("ignore")


def decided(monkeypatch: pytest.MonkeyPatch, onto: str) -> None:
    """Let `decide` take a base whatever was measured."""
    honest = onto_choice.decide

    def forced(facts: Any) -> OntoDecision:
        return {**honest(facts), "onto": onto, "why": "so that both are tried"}  # type: ignore[typeddict-item]

    monkeypatch.setattr(onto_choice, "decide", forced)


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_the_files_are_those_of_the_recipe_that_names_the_base(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onto: str
) -> None:
    decided(monkeypatch, onto)
    made = e2e.run(project, tmp_path / "auto", AUTO, until="quantize")
    named = e2e.run(project, tmp_path / "named", FEW | {"merge.onto": onto}, until="quantize")
    for part in ("merged", "gptq"):
        mine, theirs = (e2e.digests(run.path / part, "*.safetensors") for run in (made, named))
        assert mine == theirs
        assert mine
    log = (made.path / "log.txt").read_text()
    assert f"merged onto {merge_onto_probe.WORDS[onto]}: so that both are tried" in log  # type: ignore[index]
    assert "onto: auto" in (made.path / "recipe.yaml").read_text(), "the run's recipe says what was asked for"
    again = e2e.run(project, tmp_path / "auto", FEW | {"merge.onto": onto}, until="quantize")
    assert again.ran == [], "the recipe that names the base has the same keys"


def test_a_whole_run_says_what_was_taken_and_why(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = e2e.run(project, tmp_path, AUTO)
    report: Any = made.report
    choice = report["facts"]["base"]["choice"]
    assert choice["onto"] in ("dequantized", "original")
    assert [s["set"] for s in choice["sets"]] == ["in-domain", "general"]
    assert f"onto: {choice['onto']}" in report["facts"]["recipe"]
    for page in (markdown.render(report), html.render(report)):
        assert "merged onto (auto)" in page
        assert f"{choice['onto']}: {choice['why']}".split(" (")[0] in page
        assert "both merges on general" in page
    monkeypatch.setattr(merge_onto_probe, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert e2e.run(project, tmp_path, AUTO).ran == []


def test_one_base_is_not_measured(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_onto_probe, "measure", lambda *_, **__: pytest.fail("there is nothing to choose"))
    alone = AUTO | {"base": {"model": "./base"}}
    prepared = prepare.prepare(e2e.recipe(project, tmp_path, alone))
    assert any("merge.onto: auto has one base to choose from" in w for w in prepared.warnings)
    made = e2e.run(project, tmp_path, alone, until="merge")
    named = e2e.run(project, tmp_path, alone | {"merge.onto": "dequantized"}, until="merge")
    assert made.ran == ["merge"]
    assert named.ran == []


def test_a_16_bit_base_that_training_quantized_has_both(project: Path, tmp_path: Path) -> None:
    base = {"model": "./original", "nf4": {"quant_type": "nf4", "double_quant": True}}
    prepared = prepare.prepare(e2e.recipe(project, tmp_path, AUTO | {"base": base}))
    assert prepared.merge.other is not None
    assert prepared.merge.other.base.simulate is None
    assert prepared.merge.plan.base.simulate is not None
    plain = prepare.prepare(e2e.recipe(project, tmp_path, AUTO | {"base": {"model": "./original", "nf4": "none"}}))
    assert plain.merge.other is None
    assert any("merge.onto: auto has nothing to choose from" in warning for warning in plain.warnings)


def test_what_is_wrong_with_the_original_is_told_by_check(project: Path, tmp_path: Path) -> None:
    mine = e2e.copied(project, tmp_path / "p", "original")
    e2e.edit_tensors(mine / "original" / "model.safetensors", lambda t: {k: v for k, v in t.items() if "up" not in k})
    with pytest.raises(runner.InputError, match=r"base\.original: .*original"):
        prepare.prepare(e2e.recipe(mine, tmp_path, AUTO))


def test_check_refuses_what_only_the_original_is_refused_for(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = e2e.recipe(project, tmp_path, AUTO)
    inputs = SharedInputs()
    prepared, told = prepare.prepare(wanted, shared=inputs), prepare.prepare

    def refusing(recipe: Any, *args: Any, **options: Any) -> Any:
        if recipe.merge.onto == "original":
            raise runner.InputError("the original is too wide")
        return told(recipe, *args, **options)

    monkeypatch.setattr(prepare, "prepare", refusing)
    with pytest.raises(runner.InputError, match="too wide"):
        merge_onto.refuse_early(prepared, inputs)
    merge_onto.refuse_early(
        dataclasses.replace(prepared, merge=dataclasses.replace(prepared.merge, other=None)), inputs
    )


def test_a_decision_of_other_text_is_made_anew(project: Path, tmp_path: Path) -> None:
    """The key has the sets' digests."""
    first = e2e.run(project, tmp_path, AUTO, until="merge")
    changes = AUTO | {"evaluate.sets.0.document_tokens": 24}
    again = runner.run(e2e.recipe(project, tmp_path, changes), until="merge")
    log = (again.path / "log.txt").read_text()
    assert first.path == again.path
    assert log.count("merged onto ") == 2
    assert dataclasses.asdict(again)["ran"] == []

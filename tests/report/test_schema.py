"""`requant_eval.report.schema`: the JSON Schema of report.json, reports of other versions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from helpers.reports import FACTS, OLD, built, result

from requant_eval.errors import EvaluationError
from requant_eval.gate import parse
from requant_eval.render import markdown, model_card
from requant_eval.report.assemble import SCHEMA_VERSION, build, conclude, dumps
from requant_eval.report.schema import json_schema, load, upgrade


def validator() -> Any:
    made = json_schema()
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


@pytest.mark.parametrize("variants", [("base", "adapter", "merged", "rtn", "gptq"), ("adapter", "gptq"), ("gptq",)])
def test_what_is_built_matches_the_schema(variants: tuple[str, ...]) -> None:
    gates = [parse("ppl_increase in-domain 5%"), parse("ppl_increase in-domain 50% of rtn")]
    report = build(sets=[result("in-domain", variants), result("few", variants, documents=3)], facts=FACTS, gates=gates)
    read = json.loads(dumps(report))
    assert list(validator().iter_errors(read)) == []
    assert upgrade(read) == report
    bare = json.loads(dumps(build(sets=[result("x", variants)], facts={})))
    assert list(validator().iter_errors(bare)) == []


DAMAGE = {
    "verdict.status": "maybe",
    "gates.0.limit": "5%",
    "sets.0.edges.0.kind": "magic",
    "sets.0.edges.0.delta.value": "0.1",
    "sets.0.documents.gptq.nll": [1.0, None],
    "sets.0.n_documents": 2.5,
    "sets": {},
    "recommendation.choice": "cloud",
}


@pytest.mark.slow
@pytest.mark.parametrize("place", DAMAGE)
def test_damage_is_found_by_the_schema_and_by_the_reader(place: str, tmp_path: Path) -> None:
    report = json.loads(dumps(built()))
    *path, last = place.split(".")
    section: Any = report
    for step in path:
        section = section[int(step)] if isinstance(section, list) else section[step]
    section[last] = DAMAGE[place]
    assert list(validator().iter_errors(report))
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(EvaluationError, match=rf"report\.json: does not match the schema: .*{last}"):
        load(tmp_path)


@pytest.mark.parametrize("place", ["edges.0.from", "edges.1.to", "kernels.0.from"])
def test_a_step_of_a_variant_without_a_result_is_found(place: str) -> None:
    report = json.loads(dumps(built()))
    found, (steps, number, end) = report["sets"][0], place.split(".")
    of_an_edge = {key: found["edges"][0][key] for key in ("from", "to", "delta", "loss_percent")}
    found["kernels"] = [of_an_edge | {"kind": "kernel", "n_documents": 3, "n_tokens": 9, "dtype": "d", "device": "cpu"}]
    found[steps][int(number)][end] = "gone"
    with pytest.raises(EvaluationError, match=rf"sets\.0\.{place}: 'gone' is no variant of the set"):
        upgrade(report)


@pytest.mark.parametrize("key", ["sets", "facts", "verdict", "gates"])
def test_a_lost_section_is_found(key: str) -> None:
    report = built()
    del report[key]
    assert list(validator().iter_errors(json.loads(json.dumps(report))))
    with pytest.raises(EvaluationError, match=f"{key}: Field required"):
        upgrade(report)


def test_more_keys_are_allowed() -> None:
    report = built() | {"canaries": {"asked": 20}}
    report["sets"][0]["more"] = 1
    assert upgrade(report) == report
    assert list(validator().iter_errors(json.loads(json.dumps(report)))) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a report of requant: schema_version is missing"),
        ("{}", "not a report of requant"),
        ('{"schema_version": true}', "not a report of requant"),
        ('{"schema_version": 99}', "schema version 99, this requant reads up to 2: upgrade requant"),
        ('{"schema_version": 1}', "schema version 1, but KeyError.'sets'. is missing"),
    ],
)
def test_what_is_no_report_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(text)
    with pytest.raises(EvaluationError, match=f"r.json: {message}"):
        load(file)
    assert file.read_text() == text
    with pytest.raises(EvaluationError, match=r"nothing\.json: cannot be read"):
        load(tmp_path / "nothing.json")


def test_a_report_of_version_1_is_read_and_rendered() -> None:
    """A report of version 1 keeps its numbers; verdict and recommendation are computed now."""
    old = json.loads(OLD.read_text())
    assert old["schema_version"] == 1
    report = load(OLD)
    assert report["schema_version"] == SCHEMA_VERSION
    assert list(validator().iter_errors(report)) == []
    for before, after in zip(old["sets"], report["sets"], strict=True):
        assert after["tails"] is None
        for key in ("variants", "edges", "retention", "documents", "digest"):
            assert after[key] == before[key]
    assert report["headline"] == old["headline"]
    assert (report["verdict"]["status"], report["gates"]) == ("none", [])
    text = markdown.render(report)
    for s in old["sets"]:
        assert f"## {s['name']}" in text
    assert "None" not in text
    assert model_card.model_card(report)


def test_gates_can_be_held_against_an_old_report() -> None:
    report = load(OLD)
    loose, strict = (conclude(report, [parse(f"ppl_increase in-domain {limit}%")]) for limit in (90, 0.01))
    assert (loose["verdict"]["status"], strict["verdict"]["status"]) == ("pass", "fail")
    flips = conclude(report, [parse("right_to_wrong in-domain 10% of rtn")])
    assert flips["gates"][0]["text"].endswith("right_to_wrong was not measured on in-domain"), (
        "version 1 kept no such sums"
    )


def test_upgrading_changes_nothing_it_was_given() -> None:
    old = json.loads(OLD.read_text())
    kept = copy.deepcopy(old)
    upgrade(old)
    assert old == kept

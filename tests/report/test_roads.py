"""The roads of a report: what ships among what people would otherwise ship."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from helpers import reports
from helpers.reports import FACTS, HOSTILE, SHIFT, result

from requant_eval.errors import EvaluationError
from requant_eval.render import compare_tables, html, markdown, model_card
from requant_eval.report.assemble import build, dumps
from requant_eval.report.compare import Entrant, compare
from requant_eval.report.schema import json_schema, upgrade

LOSSES = {"healed": 0.025, "nf4-merge": 0.09, "nf4-again": 0.07, "gptqmodel": 0.01}
SIZES = {"gptq": 99, "healed": 99, "rtn": 99, "nf4-merge": 97, "nf4-again": 97, "gptqmodel": 101}


def road(name: str, **changes: Any) -> dict[str, Any]:
    own = {"name": name, "by": f"the library of {name}", "settings": "4 bits", "unquantized": 3_000_000}
    return own | {"bytes": SIZES[name] * 10**6, "missing": None} | changes


def report(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any], variants: tuple[str, ...] = ()) -> dict[str, Any]:
    for name, shift in LOSSES.items():
        monkeypatch.setitem(reports.SHIFT, name, shift)
    names = variants or tuple(SHIFT)
    made = build(
        sets=[result("general", names), result("in-domain", names)], facts=FACTS | {"roads": list(rows)},
        in_domain="in-domain",
    )  # fmt: skip
    return json.loads(dumps(made))


def rows(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in made["roads"]}


def test_what_ships_stands_among_the_roads(monkeypatch: pytest.MonkeyPatch) -> None:
    made = report(monkeypatch, *map(road, SIZES))
    found = rows(made)
    assert list(found) == ["merged", *SIZES]
    assert [name for name, one in found.items() if one["ships"]] == ["healed"]
    assert found["merged"]["bytes"] == FACTS["cost"]["bytes"]["merged"]
    assert {found[name]["bytes"] for name in SIZES} == {n * 10**6 for n in SIZES.values()}
    s = made["sets"][1]
    for name, one in found.items():
        step = next(e for e in s["edges"] if (e["from"], e["to"]) == ("adapter", name))
        assert one["loss"]["in-domain"] == step["loss_percent"]
        assert one["kl"]["in-domain"] == step["kl"]["mean"]
    jsonschema.Draft202012Validator(json_schema()).validate(made)
    assert upgrade(made) == made


def test_times_are_ratios_of_ln_perplexity_paired_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    made = report(monkeypatch, *map(road, SIZES))
    documents = made["sets"][1]["documents"]
    nll = {name: np.array(documents[name]["nll"]) for name in documents}
    for name in ("rtn", "nf4-merge", "gptqmodel"):
        times = rows(made)[name]["times"]["in-domain"]
        expected = (nll[name] - nll["adapter"]).sum() / (nll["healed"] - nll["adapter"]).sum()
        assert times["value"] == pytest.approx(expected)
        assert times["low"] < expected < times["high"]
    assert rows(made)["healed"]["times"]["in-domain"]["value"] == pytest.approx(1)


def test_without_a_sure_loss_of_what_ships_there_is_no_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "healed", 0.0)
    made = report(monkeypatch, *map(road, SIZES))
    assert {one["times"]["in-domain"] for one in made["roads"]} == {None}
    assert "has no sure loss that others could be compared with" in markdown.render(made)


def test_a_road_that_beats_what_ships_is_named_and_a_larger_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    said = markdown.render(report(monkeypatch, *map(road, SIZES)))
    assert "no road loses surely less than what ships (healed) in no more bytes" in said
    smaller = [road(name, bytes=99_000_000) for name in SIZES]
    said = markdown.render(report(monkeypatch, *smaller))
    assert "On in-domain, gptqmodel loses surely less than what ships (healed) in no more bytes" in said


def test_a_road_that_was_not_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    why = f"PEFT cannot: {HOSTILE}"
    missing = road("nf4-merge", bytes=None, unquantized=None, settings=HOSTILE, by=HOSTILE, missing=why)
    names = tuple(name for name in (*SHIFT, *LOSSES) if name != "nf4-merge")
    made = report(monkeypatch, *[missing if n == "nf4-merge" else road(n) for n in SIZES], variants=names)
    found = rows(made)["nf4-merge"]
    assert (found["variant"], found["missing"]) == (None, why)
    assert {*found["loss"].values(), *found["kl"].values(), *found["times"].values()} == {None}
    page = html.render(made)
    assert "not measured: PEFT cannot: &#34;&#39;&gt;&lt;script&gt;" in page
    assert "<script>hacked" not in page
    assert "<img" not in page
    text = markdown.render(made)
    assert "<script>hacked" not in text
    assert "nf4-merge | not measured | not measured" in text


def test_the_picture_marks_what_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    page = html.render(report(monkeypatch, *map(road, SIZES)))
    figure = page[page.index("Loss against bytes on in-domain") :]
    figure = figure[: figure.index("</figure>")]
    marks = figure.split("<title>")[1:]
    assert [mark.split(":")[0] for mark in marks if 'class="level"' in mark] == ["healed (ships)"]
    assert len(marks) == len(SIZES), "every quantized road, and not the merged model"


def test_without_roads_the_report_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made = report(monkeypatch, variants=("base", "adapter", "merged", "rtn", "gptq"))
    assert "roads" not in made
    assert "## Roads" not in markdown.render(made)


def test_a_road_of_a_variant_that_was_not_scored_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    made = report(monkeypatch, *map(road, SIZES))
    made["roads"][-1]["variant"] = "nobody"
    with pytest.raises(EvaluationError, match=r"roads.6.variant: 'nobody' is no variant of the first set"):
        upgrade(made)


def test_a_card_names_other_ways_to_ship_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = report(monkeypatch, *map(road, SIZES))
    card = model_card.model_card(made)
    assert "| GPTQ, healed, this run (this checkpoint) |" in card
    assert "| GPTQ of the merged model by gptqmodel's defaults |" in card
    plain = model_card.model_card(made, without=("healed",))
    assert "| GPTQ, this run (this checkpoint) |" in plain
    assert "healed, this run" not in plain, "a card of gptq is of no other checkpoint"
    assert "Other ways to ship" not in model_card.model_card(report(monkeypatch))  # type: ignore[arg-type]


def test_runs_are_compared_with_their_roads(monkeypatch: pytest.MonkeyPatch) -> None:
    first: Any = report(monkeypatch, *map(road, SIZES))
    second: Any = report(
        monkeypatch,
        road("nf4-again"),
        road("nf4-merge", missing="no memory"),
        variants=("adapter", "gptq", "nf4-again"),
    )
    entrants = [Entrant.of("a", first), Entrant.of("a:gptq", first, "gptq"), Entrant.of("b", second)]
    found = compare(entrants)
    assert [(r["run"], r["name"]) for r in found["roads"]] == [
        *(("a", name) for name in ("merged", *SIZES)), ("b", "gptq"), ("b", "nf4-again"),
    ]  # fmt: skip
    again = found["roads"][-1]
    assert (again["set"], again["loss"], again["bytes"]) == (
        "in-domain", rows(second)["nf4-again"]["loss"]["in-domain"], 97 * 10**6,
    )  # fmt: skip
    table = compare_tables.roads_table(found)
    assert ("a", "healed (ships)") in [row[:2] for row in table.rows]
    assert "## Roads" in markdown.page(compare_tables.document(found))
    without = compare([Entrant.of("a", report(monkeypatch)), Entrant.of("b", report(monkeypatch))])  # type: ignore[arg-type]
    assert without["roads"] == []
    assert compare_tables.roads_table(without).rows == ()

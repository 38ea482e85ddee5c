"""Recipe, report.json and Python API keep what the last release promised."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import contracts
from helpers.contracts import ROOT, STORED, broken_calls, broken_input, broken_output

import requant
from requant.errors import RecipeError
from requant.recipe import parse
from requant_eval.errors import EvaluationError
from requant_eval.report.schema import upgrade

NOW = contracts.current()
RECIPE, REPORT = contracts.versions()
DO = "keep it, or raise the version and record the contract of the next one: docs/versions.md"


def stored(file: str) -> Any:
    path = STORED / file
    assert path.is_file(), f"{file}: the version was raised: record what it promises (docs/versions.md)"
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("file", "broken"),
    [(f"recipe-{RECIPE}.json", broken_input), (f"report-{REPORT}.json", broken_output), ("python.json", broken_calls)],
)
def test_what_was_promised_is_kept(file: str, broken: Callable[[Any, Any], list[str]]) -> None:
    before = stored(file)
    assert len(before) > 40
    assert broken(before, before) == []
    assert broken(before, NOW[file]) == [], DO


def changed(file: str, change: Callable[[Any], None]) -> tuple[Any, Any]:
    before = stored(file)
    after = copy.deepcopy(before)
    change(after)
    return before, after


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda k: k.pop("quantize.bits"), ["quantize.bits: is gone"]),
        (lambda k: k["quantize.bits"].update(default=3), ["quantize.bits: the default was 4, is 3"]),
        (lambda k: k["quantize.bits"].update(required=True), ["quantize.bits: is required now"]),
        (lambda k: k["quantize.bits"]["takes"][0]["enum"].remove(2), ["quantize.bits: took"]),
        (lambda k: k["quantize.sweeps"]["takes"][0].update(maximum=50), ["quantize.sweeps: took"]),
        (lambda k: k["quantize.sweeps"]["takes"][0].update(minimum=1), ["quantize.sweeps: took"]),
        (lambda k: k["name"]["takes"][0].update(pattern="^[a-z]*$"), ["name: took"]),
        (lambda k: k.update({"quantize.new": {"required": True, "takes": []}}), ["quantize.new: is new and required"]),
        (lambda k: k.update({"owner": {"required": True, "takes": []}}), ["owner: is new and required"]),
        (lambda k: k.update({"quantize.new": {"required": False, "takes": [], "default": 1}}), []),
        (lambda k: k["quantize.bits"]["takes"][0]["enum"].append(6), []),
        (lambda k: k["quantize.sweeps"]["takes"][0].update(maximum=500), []),
        (lambda k: k["quantize.sweeps"]["takes"].append({"type": "string", "enum": ["auto"]}), []),
        (lambda k: k["name"].update(required=False, takes=[*k["name"]["takes"], {"type": "null"}]), []),
    ],
)
def test_what_a_recipe_may_not_lose(change: Callable[[Any], None], said: list[str]) -> None:
    found = broken_input(*changed(f"recipe-{RECIPE}.json", change))
    assert len(found) == len(said)
    assert all(one.startswith(start) for one, start in zip(found, said, strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda k: k.pop("headline"), ["headline: is gone"]),
        (lambda k: k["headline"].update(required=False), ["headline: may be missing now"]),
        (lambda k: k["headline"]["takes"].append({"type": "null"}), ["headline: was"]),
        (lambda k: k["verdict.status"]["takes"][0]["enum"].append("unknown"), []),
        (lambda k: k.update({"more": {"required": True, "takes": [{"type": "string"}]}}), []),
    ],
)
def test_what_a_report_may_not_lose(change: Callable[[Any], None], said: list[str]) -> None:
    found = broken_output(*changed(f"report-{REPORT}.json", change))
    assert len(found) == len(said)
    assert all(one.startswith(start) for one, start in zip(found, said, strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda k: k.pop("requant.sweep"), True),
        (lambda k: k["requant.sweep"].pop(0), True),
        (lambda k: k["requant.sweep"].reverse(), True),
        (lambda k: k["requant.run.run"][1].__setitem__(2, False), True),
        (lambda k: k["requant.run.run"].append(["new", "KEYWORD_ONLY", False]), True),
        (lambda k: k["requant.run.run"].append(["new", "KEYWORD_ONLY", True]), False),
        (lambda k: k["requant.load"].append(["new", "POSITIONAL_OR_KEYWORD", True]), False),
    ],
)
def test_which_calls_may_not_break(change: Callable[[Any], None], said: bool) -> None:
    assert bool(broken_calls(*changed("python.json", change))) is said


def test_a_file_of_a_newer_version_says_so() -> None:
    text = f"version: {RECIPE + 1}\nname: x\n"
    with pytest.raises(RecipeError, match=r"recipe.yaml:1: version: .*newer requant"):
        parse(text, directory=".")
    with pytest.raises(EvaluationError, match="upgrade requant"):
        upgrade({"schema_version": REPORT + 1})


def test_the_version_has_its_section_in_the_changelog() -> None:
    """And docs/versions.md names the versions of this code."""
    found = re.findall(r"^## \[(\S+)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert found[0] == ("Unreleased", "")
    assert found[1][0] == requant.__version__
    assert all(date for _, date in found[1:])
    page = (ROOT / "docs" / "versions.md").read_text()
    assert f"| recipe | `version` | {RECIPE} |" in page
    assert f"| `report.json` | `schema_version` | {REPORT} |" in page
    assert f"| requant | `requant --version` | {requant.__version__} |" in page


def test_every_contract_is_of_a_version_up_to_this_one() -> None:
    numbers = {
        name: [int(f.stem.partition("-")[2]) for f in Path(STORED).glob(f"{name}-*.json")]
        for name in ("recipe", "report")
    }
    assert max(numbers["recipe"]) == RECIPE
    assert max(numbers["report"]) == REPORT

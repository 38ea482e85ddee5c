"""Answers of variants side by side: checks passed, differences, what the shipped one loses."""

from __future__ import annotations

import pytest

from requant_eval.metrics.answers import AskedPrompt, GivenAnswers, first_difference, section
from requant_eval.report.schema import RECORDS


def prompts(count: int) -> list[AskedPrompt]:
    return [AskedPrompt(row=n + 1, shown=f"question {n}?", text=f"question {n}?", own="yes") for n in range(count)]


def test_counts_differences_and_lost_checks() -> None:
    found = section(
        GivenAnswers(
            set_name="in-domain", new_tokens=64, prompts=prompts(3),
            given={
                "adapter": [("The answer is four.", True), ("It is warm.", True), ("no limit", False)],
                "merged": [("The answer is four.", True), ("It is cold.", True), ("no limit", False)],
                "healed": [("The  answer is\nfour.", True), ("It is " + "warm " * 20, False), ("no end", False)],
            },
        )
    )  # fmt: skip
    assert (found["reference"], found["shipped"]) == ("adapter", "healed")
    by = {v["name"]: v for v in found["variants"]}
    assert by["adapter"]["checks"]["ended"] == {"passed": 2, "of": 3}
    assert by["healed"]["checks"]["ended"] == {"passed": 1, "of": 3}
    assert by["healed"]["checks"]["no_loop"] == {"passed": 2, "of": 3}
    assert "tool_call" not in by["healed"]["checks"], "nothing to judge"
    assert by["healed"]["differ"] == {"adapter": 2, "merged": 2}, "blanks and line ends are no difference"
    assert by["merged"]["differ"] == {"adapter": 1, "healed": 2}
    assert found["lost"] == [{"row": 2, "check": "ended"}, {"row": 2, "check": "no_loop"}]
    assert [item["differs"] for item in found["items"]] == [{}, {"merged": 2, "healed": 2}, {"healed": 1}]
    assert found["items"][2]["failed"] == {"adapter": ["ended"], "merged": ["ended"], "healed": ["ended"]}
    assert found["items"][0]["given"]["adapter"] == "The answer is four."


def test_without_the_adapter_the_merged_model_is_the_reference() -> None:
    found = section(
        GivenAnswers(
            set_name="s", new_tokens=8, prompts=prompts(1),
            given={"adapter": [], "merged": [("a b", True)], "gptq": [("a c", True)]},
        )
    )  # fmt: skip
    assert found["reference"] == "merged"
    assert [v["answered"] for v in found["variants"]] == [0, 1, 1]
    assert found["variants"][2]["differ"] == {"merged": 1}
    assert found["items"][0]["differs"] == {"gptq": 1}


def test_without_prompts_the_reason_is_kept() -> None:
    found = section(GivenAnswers(set_name="s", new_tokens=8, why="its rows are plain text"))
    assert (found["why"], found["items"], found["variants"], found["reference"]) == (
        "its rows are plain text", [], [], None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reference", "at"),
    [("a b c", "a b c", None), ("a  b\nc", "a b c", None), ("a x c", "a b c", 1), ("a b", "a b c", 2), ("", "a", 0)],
)
def test_the_first_word_that_differs(text: str, reference: str, at: int | None) -> None:
    assert first_difference(text, reference) == at


def test_the_schema_knows_the_section() -> None:
    assert "AnswersSection" in {record.__name__ for record in RECORDS}

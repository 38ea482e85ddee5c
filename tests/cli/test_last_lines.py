"""`requant.cli.last_lines`: the next command, by the verdict and by what reads the formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.reports import built

from requant.cli import last_lines

GPTQ = {"directory": "healed", "read_by": ["vllm", "transformers"]}


def following(status: str, more: int | None = None, **formats: dict[str, Any]) -> str:
    report: Any = built() | {"verdict": {"status": status, "line": "", "more_documents": more}}
    report["facts"] = report["facts"] | {"formats": formats or {"gptq": GPTQ}}
    return last_lines.following(report, Path("runs/a"))


@pytest.mark.parametrize(
    ("status", "more", "says"),
    [
        ("pass", None, "`vllm serve runs/a/healed`; `requant verify runs/a/healed --with vllm` proves it"),
        ("none", None, "`vllm serve runs/a/healed`"),
        ("fail", None, "`requant report runs/a/recipe.yaml --suggest` measures which modules are worth more bits"),
        ("inconclusive", 40, "give the evaluation sets about 40 more held-out documents and start the same command"),
        ("inconclusive", None, "give the evaluation sets more held-out documents and start"),
    ],
)
def test_the_next_command(status: str, more: int | None, says: str) -> None:
    assert following(status, more).startswith(says)


def test_what_gets_more_documents_is_what_the_open_gates_measured() -> None:
    """A task's documents are its own: more rows in an evaluation set would decide nothing."""
    report: Any = built() | {"verdict": {"status": "inconclusive", "line": "", "more_documents": 40}}
    gate = {"metric": "task", "set": "words", "status": "inconclusive"}
    decided = {"metric": "kl", "set": "general", "status": "pass"}
    for gates, what in (
        ([gate, decided], "the task words"),
        ([gate, decided | {"status": "inconclusive"}], "the evaluation sets and the task words"),
        ([decided | {"status": "inconclusive"}], "the evaluation sets"),
    ):
        said = last_lines.following(report | {"gates": gates}, Path("runs/a"))
        assert said.startswith(f"give {what} about 40 more held-out documents")


def test_a_server_is_named_for_a_format_that_it_reads() -> None:
    alone = GPTQ | {"read_by": ["sglang", "gptqmodel"]}
    packed = {"directory": "compressed-tensors", "read_by": ["vllm"]}
    assert following("pass", gptq=alone, packed=packed).startswith("`vllm serve runs/a/compressed-tensors`; ")
    said = "load it in sglang or gptqmodel: vLLM reads none of its formats"
    assert following("pass", gptq=alone) == said
    unread = "load it in no engine that is known: vLLM reads none of its formats"
    assert following("pass", gptq=alone | {"read_by": []}) == unread

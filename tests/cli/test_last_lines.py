"""`requant.cli.last_lines`: the next command, by the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.reports import built

from requant.cli import last_lines


@pytest.mark.parametrize(
    ("status", "more", "says"),
    [
        ("pass", None, "`vllm serve runs/a/healed`; `requant verify runs/a/healed --with vllm` proves it"),
        ("none", None, "`vllm serve runs/a/healed`"),
        ("fail", None, "`requant report recipe.yaml --suggest` measures which modules are worth more bits"),
        ("inconclusive", 40, "give the evaluation sets about 40 more held-out documents and start the same command"),
        ("inconclusive", None, "give the evaluation sets more held-out documents and start"),
    ],
)
def test_the_next_command(status: str, more: int | None, says: str) -> None:
    report: Any = built() | {"verdict": {"status": status, "line": "", "more_documents": more}}
    assert last_lines.following(report, Path("recipe.yaml"), Path("runs/a/healed")).startswith(says)

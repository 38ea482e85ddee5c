"""docs/adapters.md lists every adapter kind of the code, as merged or as refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.adapters import unsupported
from requant.adapters.kinds import KINDS

ROWS = [
    line.split("|")[1:4]
    for line in (Path(__file__).parents[2] / "docs" / "adapters.md").read_text().splitlines()
    if line.startswith("| ")
]
PROMPTS = {
    "PROMPT_TUNING": "prompt", "MULTITASK_PROMPT_TUNING": "prompt", "P_TUNING": "P-tuning", "PREFIX_TUNING": "prefix",
    "ADAPTION_PROMPT": "adaption prompt", "CARTRIDGE": "prompt",
}  # fmt: skip


def column(word: str) -> str:
    """The second column of the only row that names `word`."""
    found = {row[1].strip() for row in ROWS if word in row[0]}
    assert len(found) == 1, f"{word}: {found}"
    return found.pop()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_kinds(kind: str) -> None:
    rows = [row[1].strip() for row in ROWS if kind in row[0].replace("ADALORA", "")]
    assert "exact" in rows


@pytest.mark.parametrize("kind", unsupported.REASONS)
def test_refused_kinds(kind: str) -> None:
    assert column(PROMPTS.get(kind, kind)) == "refused"

"""AGENTS.md: the keys of report.json that it names exist, its exit codes are the real ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.reports import answered, full

from requant.cli import exit_codes

PAGE = (Path(__file__).resolve().parents[1] / "AGENTS.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
KEYS = re.findall(r"`([\w.\[\]]+)`", "\n".join(re.findall(r"^\| (`[^|]+) \|", SECTIONS["report.json"], re.MULTILINE)))


def at(value: Any, path: str) -> Any:
    for step in path.split("."):
        value = value[step.removesuffix("[]")]
        if step.endswith("[]"):
            assert value, path
            value = value[0]
    return value


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_the_report_exists(key: str) -> None:
    assert at(answered(), key) is not None


def test_parts_of_a_step_and_of_a_variant_exist() -> None:
    assert len(KEYS) >= 10
    step, variant = at(full(), "sets[].edges[]"), at(full(), "sets[].variants[]")
    assert {"from", "to", "kind", "loss_percent", "kl"} <= step.keys()
    assert {"value", "low", "high"} <= step["loss_percent"].keys()
    assert "ppl" in variant
    with pytest.raises(KeyError):
        at(full(), "sets[].nothing")


def test_the_exit_codes_are_the_real_ones() -> None:
    told = re.findall(r"^\| ([\d, ]+) \|", SECTIONS["Exit codes"], re.MULTILINE)
    assert {int(n) for row in told for n in row.split(",")} == set(exit_codes.MEANINGS)

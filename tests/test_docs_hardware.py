"""The computed tables of recipes/README.md and docs/hardware.md are the result file's."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "2026-11-30-hardware.json"


def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_hardware", ROOT / "bench" / "hardware.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


BENCH = bench()
MODELS = json.loads(RESULT.read_text())["models"]


def test_the_gallery_has_the_sizes() -> None:
    assert "\n".join(BENCH.sizes_table(MODELS)) in (ROOT / "recipes" / "README.md").read_text()


def test_the_page_has_both_tables() -> None:
    page = (ROOT / "docs" / "hardware.md").read_text()
    assert "\n".join(BENCH.sizes_table(MODELS)).replace("](", "](../recipes/") in page
    assert "\n".join(BENCH.gpus_table(MODELS)) in page


def test_every_model_has_a_recipe_and_is_computed() -> None:
    assert MODELS.keys() == BENCH.MODELS.keys()
    assert all((ROOT / "recipes" / name / "recipe.yaml").is_file() for name in MODELS)


def test_a_time_is_measured_or_computed_and_says_which() -> None:
    table = BENCH.sizes_table(MODELS)[2:]
    times = dict(zip(MODELS, (row.split(" | ")[-1].removesuffix(" |") for row in table), strict=True))
    assert all(("measured" in time) + ("computed" in time) + ("not known" in time) == 1 for time in times.values())
    assert {name for name, time in times.items() if "computed" not in time} == BENCH.TIMES.keys()
    assert MODELS["llama-3.1-8b"]["seconds"] == pytest.approx(33, rel=0.15), "33 s were measured, on an H100"
    large = MODELS["llama-3.3-70b"]["seconds"] / 60
    assert f"8 minutes were measured for 70B where {large:.0f} are" in (ROOT / "recipes" / "README.md").read_text()


@pytest.mark.slow
def test_one_model_is_computed_as_stored() -> None:
    """By this code and any transformers: its sizes are the published ones."""
    needs = BENCH.Model("llama-3.1-8b").needs()
    stored = MODELS["llama-3.1-8b"]
    assert needs.parameters == stored["parameters"] == 8_030_261_248
    assert (needs.merged, needs.gptq) == (stored["merged"], stored["gptq"])
    assert needs.least_on_gpu < needs.paused_on_gpu
    assert needs.seconds == pytest.approx(stored["seconds"], rel=0.01)

"""Benches: functions that they name as text exist, random models are read whole."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
NAMES = {"gaps": "NAMES", "phases": "PHASES", "spans": "NAMES"}


def watched(file: str, variable: str) -> list[str]:
    """Keys of a bench's table `variable`: "package.file.function" or "...file.Class.method"."""
    for node in ast.parse((BENCH / f"{file}.py").read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == variable for t in node.targets):
            tables = [n for n in ast.walk(node.value) if isinstance(n, ast.Dict)]
            return [str(k.value) for table in tables for k in table.keys if isinstance(k, ast.Constant)]
    return []


@pytest.mark.parametrize("file", NAMES)
def test_what_a_bench_watches_exists(file: str) -> None:
    names = watched(file, NAMES[file])
    assert names
    for name in names:
        package, module, *inner = name.split(".")
        holder: Any = import_module(f"requant.{package}.{module}")
        for part in inner:
            assert hasattr(holder, part), name
            holder = getattr(holder, part)


@pytest.mark.parametrize("shape", ["pico", "pico-moe"])
def test_a_random_model_has_every_weight_of_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import_module("random_models").build(tmp_path / "model", shape, 1)
    from transformers import AutoModelForCausalLM

    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert {name: found for name, found in told.items() if found} == {}

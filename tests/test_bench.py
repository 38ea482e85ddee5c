"""The benches name functions of requant as text: each of them exists."""

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

"""The house rules that a reader relies on: who imports whom, how long things are, what starts fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIPELINE, EVAL = ROOT / "pipeline" / "requant", ROOT / "eval" / "requant_eval"
FILES = sorted([*PIPELINE.glob("*.py"), *EVAL.glob("*.py")])

# file -> the files of ours that it may import (errors is everybody's). Data flows one way: no arrow turns back.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "nf4": set(),
    "kernels": set(),
    "hessian": set(),
    "elementwise": {"kernels"},
    "staging": set(),
    "shelf": {"staging"},
    "grid": {"kernels"},
    "gptq": {"grid", "kernels"},
    "correction": {"cholesky", "gptq", "ranks"},
    "pack": set(),
    "survival": set(),
    "results": set(),
    "facts": set(),
    "watcher": set(),
    "checkpoint": {"staging"},
    "yaml_source": set(),
    "linears": set(),
    "skeleton": {"linears"},
    "data": set(),
    "adapter_keys": set(),
    "adapter_refusals": set(),
    "adapter_formulas": {"checkpoint"},
    "adapter_kinds": {"adapter_formulas", "checkpoint"},
    "adapter": {"adapter_formulas", "adapter_keys", "adapter_kinds", "adapter_refusals", "checkpoint"},
    "experts": {"adapter", "adapter_formulas"},
    "fused": {"experts", "linears"},
    "probe": {"data"},
    "artifacts": {"checkpoint"},
    "rundir": {"checkpoint"},
    "dequantize": {"checkpoint", "nf4"},
    "writer": {"checkpoint"},
    "merge_plan": {"adapter", "adapter_formulas", "adapter_keys", "checkpoint", "dequantize", "experts", "writer"},
    "merge": {"adapter_formulas", "artifacts", "checkpoint", "dequantize", "kernels", "merge_plan", "writer"},
    "match": {"adapter", "artifacts", "checkpoint", "merge"},
    "peft_runtime": {"adapter", "adapter_keys", "checkpoint", "merge"},
    "recipe_errors": {"recipe_model", "yaml_source"},
    "deltas": {"adapter", "merge", "survival"},
    "selftest_twins": {"adapter_formulas", "adapter_kinds", "checkpoint"},
    "selftest": {"adapter_formulas", "adapter_kinds", "checkpoint", "merge", "nf4", "selftest_twins"},
    "carrier": {"checkpoint", "staging"},
    "blocks": {"carrier", "checkpoint", "linears", "shelf", "skeleton", "staging"},
    "stages": {"blocks", "fit", "linears", "shelf"},
    "leaner": {"blocks", "fit", "linears", "shelf", "stages"},
    "layout": {"artifacts", "blocks", "checkpoint", "grid", "linears", "pack", "skeleton", "writer"},
    "shards": {"grid"},
    "targets": {"blocks", "grid", "layout", "linears", "shards"},
    "cholesky": {"kernels"},
    "ranks": {"cholesky"},
    "crew": {"progress", "ranks"},
    "costs": {"gptq", "grid", "results", "staging", "survival"},
    "output": {"checkpoint", "gptq", "layout", "pack", "staging", "writer"},
    "solving": {"correction", "gptq", "grid", "hessian", "kernels", "layout", "ranks"},
    "warming": {
        "blocks",
        "cholesky",
        "elementwise",
        "gptq",
        "grid",
        "kernels",
        "layout",
        "ranks",
        "skeleton",
    },
    "quantize": {
        "blocks",
        "checkpoint",
        "costs",
        "elementwise",
        "grid",
        "hessian",
        "layout",
        "leaner",
        "linears",
        "output",
        "ranks",
        "results",
        "skeleton",
        "solving",
        "stages",
        "survival",
        "warming",
    },
    "distil": set(),
    "fit": {"blocks", "distil", "grid"},
    "student": {"checkpoint", "grid", "pack", "skeleton"},
    "teacher": {"student"},
    "trainer": {"blocks", "distil", "student", "teacher"},
    "blockwise": {"blocks", "checkpoint", "distil", "fit", "skeleton", "student", "teacher", "trainer"},
    "heal": {"artifacts", "blockwise", "checkpoint", "data", "fit", "skeleton", "student", "teacher", "trainer"},
    "heal_text": {"data"},
    "weights": {"checkpoint", "dequantize", "grid", "kernels", "layout", "merge", "pack", "skeleton"},
    "variants": {"checkpoint", "dequantize", "fit", "grid", "merge", "nf4", "peft_runtime", "skeleton", "weights"},
    "streamed": {"blocks", "checkpoint", "fit", "peft_runtime", "shelf", "skeleton", "variants", "weights"},
    "sizes": {"blocks", "checkpoint", "skeleton", "variants", "weights"},
    "structure": {"artifacts", "blocks", "checkpoint", "pack", "skeleton"},
    "values": {"checkpoint", "pack", "structure"},
    "engine_transformers": set(),
    "engine_vllm": set(),
    "engines": set(),
    "sample": {"checkpoint"},
    "verify": {
        "artifacts",
        "checkpoint",
        "engines",
        "fit",
        "pack",
        "rundir",
        "sample",
        "structure",
        "values",
        "variants",
    },
    "push": {"rundir", "structure"},
    "quantize_gptqmodel": {
        "blocks",
        "checkpoint",
        "gptq",
        "grid",
        "hessian",
        "layout",
        "pack",
        "quantize",
        "skeleton",
        "stages",
        "survival",
        "writer",
    },
    "canaries": {"checkpoint", "data"},
    "resonance": {"deltas", "grid", "layout", "merge", "rundir"},
    "suggest": {"grid", "layout", "pack"},
    "swap": {"checkpoint", "skeleton", "variants"},
    "forecast_merge": {"merge", "prepare", "rehearse"},
    "rehearse": {
        "blocks",
        "elementwise",
        "facts",
        "layout",
        "output",
        "quantize",
        "ranks",
        "shelf",
        "stages",
        "streamed",
        "survival",
    },
    "evaluate": {"canaries", "fit", "rundir", "sizes", "streamed", "variants"},
    "parts": {"canaries", "evaluate", "ranks", "variants"},
    "texts": {"artifacts", "data", "heal_text", "merge", "recipe"},
    "recipe_heal": {"recipe_model", "recipe_text"},
    "recipe_gates": {"recipe_model", "recipe_text", "yaml_source"},
    "given": {"merge", "prepare", "variants"},
    "cli_reports": set(),
}
# The same for the judge. `gate` is what recipes know of it, and as light as they are.
JUDGE: dict[str, set[str]] = {
    "gate": set(),
    "statistics": set(),
    "digits": set(),
    "tokens": set(),
    "tails": {"statistics", "tokens"},
    "measures": {"statistics", "tails", "tokens", "windows"},
    "headline": {"digits"},
    "tables": {"digits"},
    "heal_tables": {"digits", "tables"},
    "served": {"statistics"},
    "verdict": {"digits", "gate", "headline", "statistics"},
    "recommend": {"digits", "gate", "headline", "served", "tables", "verdict"},
    "report": {"gate", "headline", "measures", "recommend", "served", "statistics", "verdict"},
    "schema": {"gate", "report", "verdict"},
    "ci": {"tables"},
    "compare": {"headline", "report", "statistics", "verdict"},
}
STAGES = {"checkpoint", "dequantize", "merge", "quantize", "blocks", "adapter", "data", "variants", "selftest"} | {
    "heal", "blockwise", "trainer", "student", "teacher",
    "deltas", "resonance", "swap", "canaries", "evaluate",
}  # fmt: skip


def imports(file: Path, package: str) -> set[str]:
    """Names of the files of `package` that `file` imports, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == package:
                found |= {a.name for a in node.names if (file.parent / f"{a.name}.py").exists()} or {"*"}
            elif node.module.startswith(package + "."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".", 1)[-1] for a in node.names if a.name.split(".")[0] == package}
    return found - {"__version__"}


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_the_import_table(name: str) -> None:
    file = PIPELINE / f"{name}.py"
    if not file.exists():
        pytest.skip(f"{name}.py is not there yet")
    assert imports(file, "requant") - {"errors"} <= ALLOWED[name]


@pytest.mark.parametrize("name", sorted(JUDGE))
def test_the_import_table_of_the_judge(name: str) -> None:
    assert imports(EVAL / f"{name}.py", "requant_eval") - {"errors"} <= JUDGE[name]


def test_maths_files_know_nothing_of_ours_or_of_models() -> None:
    maths = ("nf4", "kernels", "hessian", "grid", "gptq", "cholesky", "pack", "survival")
    for file in (*(PIPELINE / f"{n}.py" for n in maths), EVAL / "statistics.py"):
        text = file.read_text()
        assert imports(file, "requant") <= {"grid", "kernels"}, file.name
        for package in ("transformers", "bitsandbytes", "peft", "safetensors", "pathlib"):
            assert f"import {package}" not in text, f"{file.name} imports {package}"
            assert f"from {package}" not in text, f"{file.name} imports {package}"


def test_the_judge_does_not_know_the_accused() -> None:
    assert FILES
    for file in EVAL.glob("*.py"):
        assert imports(file, "requant") <= {"grid", "kernels"}, file.name


def test_nothing_imports_in_a_circle() -> None:
    graph = {f.stem: imports(f, "requant") for f in PIPELINE.glob("*.py")}

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        for other in graph.get(name, ()):
            walk(other, (*path, name))

    for name in graph:
        walk(name, ())


def test_stages_do_not_read_the_recipe() -> None:
    for name in STAGES:
        assert not imports(PIPELINE / f"{name}.py", "requant") & {"recipe", "recipe_model", "run", "cli"}, name


def functions(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_sizes(file: Path) -> None:
    """The ugliness of this trade is its 300-line mains: no function over 50 lines, no file over 320."""
    assert len(file.read_text().splitlines()) <= 320
    assert [(n, size) for n, size in functions(file) if size > 50] == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_every_file_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text()))


def test_help_imports_neither_torch_nor_transformers() -> None:
    """`requant --help` and a recipe error answer at once."""
    code = (
        "import sys, requant.cli\n"
        "print(sorted(m for m in ('torch', 'transformers', 'peft', 'bitsandbytes', 'datasets') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT / "pipeline",
        env={"PYTHONPATH": f"{ROOT / 'pipeline'}:{ROOT / 'eval'}", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr

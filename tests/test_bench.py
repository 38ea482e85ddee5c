"""Benches: functions that they name as text exist, random models are read whole."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import e2e

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


def ours(tree: ast.AST) -> dict[str, Any]:
    """What a bench imports of our packages: local name -> module, class or function. Raises where there is no such."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("requant", "requant_eval"):
            for alias in node.names:
                package = import_module(str(node.module))
                if not hasattr(package, alias.name):
                    import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = getattr(package, alias.name)
    return found


@pytest.mark.parametrize("file", sorted(BENCH.glob("*.py")), ids=lambda file: file.stem)
def test_what_a_bench_uses_of_our_modules_exists(file: Path) -> None:
    """Benches run seldom and on machines that are lent: a name that moved is found here."""
    tree = ast.parse(file.read_text())
    variables = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    imported = {name: holder for name, holder in ours(tree).items() if name not in variables}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            holder = imported.get(node.value.id)
            if isinstance(holder, ModuleType):
                assert hasattr(holder, node.attr), f"{file.name}:{node.lineno}: {holder.__name__}.{node.attr}"


@pytest.mark.parametrize("shape", ["pico", "pico-moe"])
def test_a_random_model_has_every_weight_of_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import_module("random_models").build(tmp_path / "model", shape, 1)
    from transformers import AutoModelForCausalLM

    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert {name: found for name, found in told.items() if found} == {}


@pytest.mark.slow
def test_a_whole_run_is_measured_by_stage_and_variant(tmp_path: Path) -> None:
    """A pico base from the bench's own inputs, on the CPU: the parts cover the whole."""
    sizes = {"layers": 2, "documents": 8, "short": 24, "long": 4, "window": 48, "samples": 8, "length": 32}
    inputs = ["random", str(tmp_path / "inputs"), "--shape=pico", *(f"--{name}={n}" for name, n in sizes.items())]
    asked = ["--inputs", *inputs, "--", "--set", "device=cpu", "--set", "heal=off"]
    command = [sys.executable, BENCH / "whole.py", *asked, "--out", tmp_path / "out.json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"].values()
    stages, parts = run["stages"], run["evaluate"]
    assert {"start and check", "merge", "probe", "quantize", "evaluate", "report"} <= stages.keys()
    assert 0 < sum(row["seconds"] for row in stages.values()) <= run["seconds"] + 0.1
    variants = ("base", "adapter", "merged", "rtn", "gptq")
    assert parts.keys() == {f"{v}{at}" for v in variants for at in (", loading", " on short", " on long")}
    assert 0 < sum(row["seconds"] for row in parts.values()) <= stages["evaluate"]["seconds"] + 0.1
    assert run["numbers"].keys() == {f"{v} on {s}" for v in variants for s in ("short", "long")}


def test_chats_of_the_bench_are_whole_and_of_different_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    chats = list(import_module("whole_inputs")._chats(["word " * 400, "too short"], 100))
    lengths = [sum(len(turn["content"]) for turn in chat["messages"]) for chat in chats]
    assert 15 < len(chats) < 25
    assert len(set(lengths)) > 10
    assert all([turn["role"] for turn in chat["messages"]] == ["user", "assistant"] for chat in chats)


@pytest.mark.slow
def test_the_bench_of_roads_writes_what_the_report_says(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = e2e.write_recipe(Path(shutil.copytree(project, tmp_path / "project"))), tmp_path / "roads.json"
    asked = ["--roads", "rtn,nf4-again", "--set", f"output.dir={tmp_path / 'runs'}"]
    monkeypatch.setattr("sys.argv", ["roads.py", str(file), "--out", str(out), *asked])
    monkeypatch.syspath_prepend(BENCH)
    with e2e.one_thread():
        import_module("roads").main()
    found = json.loads(out.read_text())
    report = json.loads((tmp_path / "runs" / "pico" / "report.json").read_text())
    assert [one["name"] for one in found["roads"]] == ["merged", "gptq", "rtn", "nf4-again"]
    assert found["roads"] == report["roads"]
    assert str(tmp_path) not in out.read_text()
    assert "nf4-again: in-domain" in capsys.readouterr().out


@pytest.mark.slow
def test_answers_are_measured_in_each_way(tmp_path: Path) -> None:
    """Of a recipe without a run, on the CPU: what is captured there runs kernel by kernel, and says the same."""
    sizes = {"layers": 2, "documents": 8, "short": 24, "long": 4, "window": 48, "samples": 8, "length": 32}
    made = ["random", str(tmp_path), "--shape=pico", *(f"--{name}={n}" for name, n in sizes.items())]
    subprocess.run([sys.executable, BENCH / "whole_inputs.py", *made], check=True, capture_output=True, cwd=tmp_path)
    asked = ["--set", "device=cpu", "--set", "evaluate.answers.begin=8", "--new-tokens", "12"]
    command = [sys.executable, BENCH / "answers.py", "--model", tmp_path / "recipe.yaml", *asked]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out.json"], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "gptq: not in" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["variants"].keys() == {"adapter", "merged"}
    for ways in found["variants"].values():
        assert list(ways) == ["plain", "decoded", "captured"]
        assert {row["same"] for row in ways.values()} == {found["prompts"]}
        assert [len(row["captures"]) for row in ways.values()] == [0, 0, 1]

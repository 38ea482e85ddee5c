"""Files are opened to be read in one place: `requant_eval.regular_files`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file for folder in ("pipeline/requant", "eval/requant_eval") for file in (ROOT / folder).rglob("*.py"))
HOME = "regular_files.py"
METHODS = {"read_text", "read_bytes", "open"}  # of a Path
CALLS = {"open", "safe_open", "load_file", "fromfile", "memmap", "is_zipfile", "ZipFile", "GzipFile"}
EXCEPTIONS = {  # file -> what it may call, and why
    "whole_files.py": {"open", "os.open"},  # for writing; directories
    "forecast_merge.py": {"open"},  # for writing: a file of its own
    "forecast.py": {"open"},  # that file
    "tokenizer.py": {"open"},  # for writing: a temporary copy
    "guarded_process.py": {"read_text"},  # /proc
    "measurements.py": {"read_text"},  # /proc
    "device.py": {"open"},  # /proc
    "outputs.py": {"open", "os.open"},  # /dev/null
    "gptqmodel_engine.py": {"open"},  # /dev/null
    "engine_transformers.py": {"open"},  # in an engine's process, which has nothing of ours, after the headers' proof
    "safetensors_header.py": {"safe_open"},  # after its header was read
    "writer.py": {"safe_open"},  # after `require_regular`, as the next two
    "summed_file.py": {"safe_open"},
    "token_scores.py": {"safe_open"},
    "text_files.py": {"GzipFile"},  # of an open file, as the next
    "other_files.py": {"is_zipfile", "ZipFile", "open"},
    "runner.py": {"open"},  # of a run directory: its lock
}
OURS = ("regular_files", "strict_json")  # whose functions are no calls of a library


def reads(source: str) -> Iterator[str]:
    """The calls that can open a file to read it, as `os.open`, or by name alone: `read_text`."""
    tree = ast.parse(source)
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).endswith(OURS)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute):
            name, of = node.func.attr, ast.unparse(node.func.value)
            if name == "open" and of == "os":
                yield "os.open"
            elif (name in METHODS or name in CALLS) and of not in OURS:
                yield name
        elif isinstance(node.func, ast.Name) and node.func.id in CALLS and node.func.id not in imported:
            yield node.func.id


def test_nothing_else_opens_files() -> None:
    found = {file: set(reads(file.read_text())) for file in FILES}
    assert len(found) > 200
    assert any(found[file] for file in FILES if file.name == HOME), "the test sees calls"
    for file, calls in found.items():
        assert file.name == HOME or calls <= EXCEPTIONS.get(file.name, set()), f"{file}: read through regular_files"
    used = {name: set().union(*(calls for file, calls in found.items() if file.name == name)) for name in EXCEPTIONS}
    assert used == EXCEPTIONS, "an exception that nobody needs"


@pytest.mark.parametrize(
    "line",
    [
        "open(p)", "p.open('rb')", "p.read_text()", "Path(p).read_bytes()", "os.open(p, 0)", "safe_open(p, framework='pt')",
        "zipfile.ZipFile(p)", "np.fromfile(p)", "io.open(p)", "safetensors.torch.load_file(p)",
    ],
)  # fmt: skip
def test_a_read_is_seen(line: str) -> None:
    assert list(reads(line))


@pytest.mark.parametrize(
    "line", ["strict_json.read_bytes(p)", "regular_files.read_bytes(p)", "file.read()", "read_json(p)", "opened(p)"]
)
def test_what_opens_nothing_is_not(line: str) -> None:
    assert not list(reads(line))

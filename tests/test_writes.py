"""Files are written in one place: `requant_eval.whole_files`, which follows no link."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file for folder in ("pipeline/requant", "eval/requant_eval") for file in (ROOT / folder).rglob("*.py"))
HOME = "whole_files.py"
OF_A_PATH = {  # methods of a Path, however it is called
    "write_text", "write_bytes", "mkdir", "unlink", "rmdir", "touch", "rename", "symlink_to", "hardlink_to", "chmod",
}  # fmt: skip
OF_A_MODULE = {  # of these modules alone: a dict may be copied
    "os": {"open", "fdopen", "link", "symlink", "rename", "replace", "unlink", "remove", "mkdir", "makedirs", "mkfifo"},
    "shutil": {"copy", "copy2", "copyfile", "copytree", "move", "rmtree"},
    "tempfile": {"mkstemp", "mkdtemp", "NamedTemporaryFile"},
    "logging": {"FileHandler"},
    "np": {"save", "savez", "memmap"},
    "torch": {"save"},
}
BY_NAME = {"save_file", "FileHandler"}
EXCEPTIONS = {  # file -> what it may call, and why
    "foreign_output.py": {"os.fdopen", "tempfile.NamedTemporaryFile"},  # stderr; a file of the system's own directory
    "guarded_process.py": {"os.fdopen"},  # pipes
    "regular_files.py": {"os.open"},  # for reading
    "outputs.py": {"os.open", "open"},  # /dev/null
    "gptqmodel_engine.py": {"open"},  # /dev/null
    "measurements.py": {"write_text"},  # /proc
    "peft_runtime.py": {"write_text", "save_file"},  # a temporary directory
    "forecast_merge.py": {"open"},  # a temporary directory
    "tokenizer.py": {"mkdir", "open"},  # a temporary directory
    "artifact.py": {"tempfile.mkdtemp", "shutil.rmtree"},  # a directory that it has just made
}


def writes(source: str) -> Iterator[str]:
    """The calls that can change files, as `os.open`, or by name alone: `write_text`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        of = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if of == "whole_files":
            continue
        if name in OF_A_MODULE.get(of, ()):
            yield f"{of}.{name}"
        elif name in BY_NAME or (method and name in OF_A_PATH):
            yield name
        elif method and name == "replace" and len(node.args) == 1 and not node.keywords and of != "dataclasses":
            yield "rename"  # str.replace takes two
        elif name == "open" and any(set(mode) & set("wax+") for mode in modes(node)):
            yield "open"


def modes(node: ast.Call) -> list[str]:
    """The constants of a call of `open` that can be its mode."""
    given = [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
    texts = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return [text for text in texts if set(text) <= set("rwaxbt+")]


def test_nothing_else_writes() -> None:
    found = {file: set(writes(file.read_text())) for file in FILES}
    assert len(found) > 200
    assert any(found[file] for file in FILES if file.name == HOME), "the test sees calls"
    for file, calls in found.items():
        assert file.name == HOME or calls <= EXCEPTIONS.get(file.name, set()), f"{file}: write through whole_files"
    used = {name: set().union(*(calls for file, calls in found.items() if file.name == name)) for name in EXCEPTIONS}
    assert used == EXCEPTIONS, "an exception that nobody needs"


@pytest.mark.parametrize(
    "line",
    [
        "open(p, 'w')", "open(p, mode='a')", "p.open('r+b')", "p.write_text(t)", "p.write_bytes(b)", "os.open(p, 1)",
        "os.replace(a, b)", "a.replace(b)", "a.rename(b)", "shutil.copyfile(a, b)", "torch.save(t, p)", "p.mkdir()",
        "save_file(t, p)", "logging.FileHandler(p)", "np.save(p, a)", "tempfile.mkstemp()", "p.unlink()",
    ],
)  # fmt: skip
def test_a_write_is_seen(line: str) -> None:
    assert list(writes(line))


@pytest.mark.parametrize(
    "line",
    ["open(p)", "p.open('rb')", "text.replace('a', 'b')", "values.copy()", "write_text(p, t)", "replace(s, x=1)"],
)
def test_what_only_reads_is_not(line: str) -> None:
    assert not list(writes(line))

"""docs/api.md: every name on it exists and has a docstring, every public name is on it."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text()
NAMES = re.findall(r"^::: (\S+)$", PAGE, re.MULTILINE)
FACES = (
    "requant", "requant.recipe", "requant.run", "requant.adapters", "requant.merge", "requant.quantize",
    "requant.heal", "requant.checkpoint", "requant.evaluate", "requant.deploy", "requant_eval.scoring",
    "requant_eval.report",
)  # fmt: skip


def found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_exists_and_says_what_it_is(name: str) -> None:
    assert re.match(r"\S.{10,}", found(name).__doc__ or "")


@pytest.mark.parametrize("face", FACES)
def test_every_public_name_of_a_package_is_on_the_page(face: str) -> None:
    shown = {id(found(name)) for name in NAMES}
    names = [name for name in importlib.import_module(face).__all__ if not name.startswith("__")]
    assert names
    missing = [name for name in names if id(found(f"{face}.{name}")) not in shown]
    assert [name for name in missing if (face, name) != ("requant", "run")] == []  # the package, called as its function


def test_what_the_examples_import_is_on_the_page() -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    imported = {
        f"{module}.{name.split(' as ')[0].strip()}"
        for module, names in re.findall(r"^from (requant\S*) import (.+)$", text, re.MULTILINE)
        for name in names.split(",")
    }
    shown = {id(found(name)) for name in NAMES}
    assert len(imported) > 10
    missing = {name for name in imported if id(found(name)) not in shown}
    assert missing - {"requant.run", "requant_eval.render.markdown"} == set()  # packages; their functions are shown


def docstrings() -> Any:
    spec = importlib.util.spec_from_file_location("site_docstrings", ROOT / "docs" / "site_docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("One line: of text.", "One line: of text."),
        ("What.\n\na: of b. b, c: more\nof it.", "What.\n\n- `a`: of b.\n- `b, c`: more\nof it."),
        ("What. a: of it.\nRaises E: no.", "What.\n\n- `a`: of it.\n\nRaises E: no."),
        ("What.\n\nRaises:\n    E: no,\n        or.\n    F: yes.", "What.\n\nRaises:\n\n- `E`: no,\n        or.\n- `F`: yes."),
        ("What.\n\n    a: code\n    b: code", "What.\n\n    a: code\n    b: code"),
    ],
)  # fmt: skip
def test_a_docstring_as_markdown(text: str, becomes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))  # it is in the docs' environment only
    assert docstrings().as_markdown(text, ["a", "b", "c"]) == becomes

"""`requant.adapters.fp64`: the self-test's formulas share no arithmetic with the merge."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib
import inspect
import pkgutil
import textwrap
from types import FunctionType
from typing import Any

import pytest
from torch import Tensor

from requant import adapters
from requant.adapters import fp64, kinds
from requant.adapters.fold import Fold, read

FILES = [importlib.import_module(f"{adapters.__name__}.{m.name}") for m in pkgutil.iter_modules(adapters.__path__)]
KINDS: list[type[Fold]] = [
    c
    for file in FILES
    for c in vars(file).values()
    if isinstance(c, type) and issubclass(c, Fold) and c is not Fold and c.__module__ == file.__name__
]
ORACLES = [
    pytest.param(kind, name, id=f"{kind.__name__}.{name}")
    for kind in KINDS
    for name in ("exact_rows", "exact_bias")
    if name in vars(kind)
]


def shared(kind: type[Fold], function: Any) -> set[str]:
    """What a formula in fp64 uses besides the fold's fields, torch, Python and `fp64`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    fields = {f.name for f in dataclasses.fields(kind)}
    used = {
        f"self.{n.attr}"
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute)
        and isinstance(n.value, ast.Name)
        and n.value.id == "self"
        and n.attr not in fields
    }
    body = [n for statement in tree.body[0].body for n in ast.walk(statement)]  # type: ignore[attr-defined]
    names = {n.id for n in body if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    known = set(function.__code__.co_varnames) | set(function.__code__.co_cellvars) | vars(builtins).keys()
    stored = {n.id for n in body if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return used | (names - known - stored - {"torch", "fp64"})


def test_every_kind_has_one() -> None:
    assert len(KINDS) >= len(kinds.KINDS)
    for kind in KINDS:
        assert "apply" in vars(kind)
        assert "exact_rows" in vars(kind), kind
        assert ("changed_bias" in vars(kind)) == ("exact_bias" in vars(kind)), kind


@pytest.mark.parametrize(("kind", "name"), ORACLES)
def test_it_uses_fields_and_fp64_alone(kind: type[Fold], name: str) -> None:
    function = vars(kind)[name]
    assert isinstance(function, FunctionType)
    assert shared(kind, function) == set()


def test_fp64_knows_no_fold() -> None:
    modules = {n.module for n in ast.walk(ast.parse(inspect.getsource(fp64))) if isinstance(n, ast.ImportFrom)}
    assert modules == {"__future__", "typing", "torch", "requant.checkpoint.reader"}


@dataclasses.dataclass(frozen=True)
class Borrowing:
    """A formula that is no oracle: it takes the delta from the code that it should check."""

    rows: Tensor

    def factors(self) -> Tensor:
        return self.rows

    def exact_rows(self, rows: Tensor) -> Tensor:
        doubled = [row + self.factors() for row in rows]
        return doubled[0] + self.rows + read(self.rows)  # type: ignore[arg-type]


def test_a_borrowed_formula_is_seen() -> None:
    assert shared(Borrowing, Borrowing.exact_rows) == {"self.factors", "read"}  # type: ignore[arg-type]

"""The project's structure: which package imports which, sizes, first lines, light imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"requant": ROOT / "pipeline", "requant_eval": ROOT / "eval"}
FILES = sorted(file for name, root in SOURCES.items() for file in (root / name).rglob("*.py"))

# package -> the packages that it may import, besides itself and `EVERYBODY`. Data flows one way: no arrow turns back.
# A file of the top level is a package of its own.
ALLOWED: dict[str, set[str]] = {
    "requant.errors": set(),
    "requant.outgoing": set(),
    "requant.numerics": {"requant.runtime"},
    "requant.runtime": set(),
    "requant.recipe": {"requant_eval.gate"},
    "requant.checkpoint": {"requant.runtime", "requant_eval.whole_files"},
    "requant.formats": {"requant.runtime", "requant.checkpoint"},
    "requant.data": {"requant.runtime", "requant.checkpoint", "requant_eval.scoring"},
    "requant.modeling": {"requant.runtime", "requant.numerics", "requant.checkpoint"},
    "requant.adapters": {"requant.runtime", "requant.checkpoint", "requant.modeling"},
    "requant.merge": {"requant.numerics", "requant.runtime", "requant.checkpoint", "requant.modeling", "requant.adapters"},
    "requant.quantize": {
        "requant.numerics", "requant.runtime", "requant.checkpoint", "requant.formats", "requant.modeling",
    },
    "requant.heal": {
        "requant.numerics", "requant.runtime", "requant.checkpoint", "requant.formats", "requant.data", "requant.modeling",
        "requant_eval.scoring",
    },
    "requant.evaluate": {
        "requant.numerics", "requant.runtime", "requant.checkpoint", "requant.formats", "requant.data", "requant.modeling",
        "requant.adapters", "requant.merge", "requant_eval.scoring",
    },
    "requant.deploy": {
        "requant.numerics", "requant.runtime", "requant.checkpoint", "requant.formats", "requant.modeling",
        "requant.quantize", "requant.evaluate", "requant_eval.scoring", "requant_eval.metrics",
    },
    "requant.tracking": set(),
    "requant.run": {
        "requant.numerics", "requant.runtime", "requant.recipe", "requant.checkpoint", "requant.formats", "requant.data",
        "requant.modeling", "requant.adapters", "requant.merge", "requant.quantize", "requant.heal", "requant.evaluate",
        "requant.deploy", "requant.tracking", "requant_eval.scoring", "requant_eval.metrics", "requant_eval.report",
        "requant_eval.render",
    },
    "requant.cli": {
        "requant.recipe", "requant.runtime", "requant.checkpoint", "requant.heal", "requant.deploy", "requant.run",
        "requant_eval.gate", "requant_eval.report", "requant_eval.render", "requant_eval.whole_files",
    },
    "requant_eval.errors": set(),
    "requant_eval.escaping": set(),
    "requant_eval.gate": set(),
    "requant_eval.regular_files": set(),
    "requant_eval.strict_json": set(),
    "requant_eval.whole_files": set(),
    "requant_eval.scoring": {"requant_eval.whole_files"},
    "requant_eval.metrics": {"requant_eval.scoring"},
    "requant_eval.report": {"requant_eval.gate", "requant_eval.metrics", "requant_eval.whole_files"},
    "requant_eval.render": {"requant_eval.gate", "requant_eval.metrics", "requant_eval.report"},
}  # fmt: skip
# package -> of one other package, the only files that it may know
NARROW = {
    "requant.adapters": {"requant.modeling": {"requant.modeling.stacked_experts"}},
    "requant.numerics": {"requant.runtime": {"requant.runtime.device"}},  # block sizes: one profile a device type
}
# what every package may import: the exceptions, the one way to open files and to read JSON, what becomes of texts that leave
EVERYBODY = {
    "requant": {
        "requant.errors", "requant.outgoing", "requant_eval.errors", "requant_eval.escaping", "requant_eval.strict_json",
        "requant_eval.regular_files",
    },
    "requant_eval": {
        "requant_eval.errors", "requant_eval.escaping", "requant_eval.strict_json", "requant_eval.regular_files",
    },
}  # fmt: skip
DOORS = {"requant", "requant.__main__", "requant_eval"}  # they belong to no package


def module_of(file: Path) -> str:
    """`requant.merge.plan`, or `requant.merge` of its `__init__`."""
    root = next(root for root in SOURCES.values() if file.is_relative_to(root))
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


LAZY = {ROOT / "eval" / "requant_eval" / "scoring" / "__init__.py"}  # the only face that imports its files by name
MODULES = {module_of(file): file for file in FILES}


def package_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(file: Path) -> set[str]:
    """Modules of ours that a file imports, wherever the import is.

    Of `from package import name` the file, if the name is one.

    Every import is written `from module import name`, in full: an attribute of `requant` would not be found here.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: imports are written in full"
            names = {f"{node.module}.{a.name}" for a in node.names}
            found |= (names & MODULES.keys()) | ({str(node.module)} if names - MODULES.keys() else set())
        elif isinstance(node, ast.Import):
            ours = [a.name for a in node.names if a.name.split(".")[0] in SOURCES]
            assert not ours, f"{file}:{node.lineno}: write from {ours[0]} import ..."
        elif isinstance(node, ast.Call) and file not in LAZY:
            called = ast.unparse(node.func).rpartition(".")[2]
            assert called not in ("import_module", "__import__"), f"{file}:{node.lineno}: {called}"
    return {name for name in found if name.split(".")[0] in SOURCES} - doors_of(file)


def doors_of(file: Path) -> set[str]:
    """The top-level package of a file's distribution: it has the version, all may import it."""
    return {name for name, root in SOURCES.items() if file.is_relative_to(root)}


def test_files_are_found_and_each_is_in_a_package() -> None:
    assert len(FILES) > 150
    assert {f.parent for f in FILES} == {f.parent for f in FILES if f.name == "__init__.py"}, "a folder without a face"
    assert {package_of(m) for m in MODULES} - DOORS == ALLOWED.keys()
    for name in ("render", "report", "metrics", "scoring"):
        assert any(m.startswith(f"requant_eval.{name}.") for m in MODULES), name


@pytest.mark.slow
def test_rules_name_what_exists() -> None:
    packages = ALLOWED.keys()
    assert {p for allowed in ALLOWED.values() for p in allowed} <= packages
    assert {m for rules in NARROW.values() for only in rules.values() for m in only} <= MODULES.keys()
    for package, allowed in ALLOWED.items():
        used = {package_of(other) for m, file in MODULES.items() if package_of(m) == package for other in imports(file)}
        assert allowed <= used, f"{package}: {sorted(allowed - used)} is allowed and never imported"


@pytest.mark.parametrize("module", sorted(MODULES.keys() - DOORS))
def test_a_package_imports_what_the_table_says(module: str) -> None:
    package = package_of(module)
    for other in imports(MODULES[module]):
        assert package_of(other) in ALLOWED[package] | {package} | EVERYBODY[package.split(".")[0]], (
            f"{module} imports {other}"
        )
        only = NARROW.get(package, {}).get(package_of(other))
        assert only is None or other in only, f"{module} imports {other}, of which {package} may know {only} alone"


def test_requant_eval_imports_nothing_of_requant() -> None:
    judge = [m for m in MODULES if m.split(".")[0] == "requant_eval"]
    assert judge
    for module in judge:
        assert {o for o in imports(MODULES[module]) if o.split(".")[0] == "requant"} == set(), module


def test_nothing_imports_in_a_circle() -> None:
    """Neither files nor packages; the face of a package counts as all that it shows."""
    graph = {m: imports(file) for m, file in MODULES.items()}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph.get(name, ()):
                walk(other, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())
    rooms = {p: {package_of(o) for m in graph if package_of(m) == p for o in graph[m]} - {p} for p in ALLOWED}
    left = dict(rooms)
    while left:
        free = [p for p, others in left.items() if not others & left.keys()]
        assert free, f"packages import each other: {sorted(left)}"
        for p in free:
            del left[p]


def test_numerics_know_no_files_and_no_models() -> None:
    numerics = [file for m, file in MODULES.items() if package_of(m) == "requant.numerics"]
    for file in (*numerics, MODULES["requant_eval.metrics.statistics"]):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            foreign = {n.split(".")[0] for n in names} & {
                "transformers",
                "bitsandbytes",
                "peft",
                "safetensors",
                "pathlib",
            }
            assert not foreign, f"{file.name} imports {foreign}"


STAGES = ("merge", "quantize", "heal", "evaluate", "deploy")


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_a_function_of_its_package(name: str) -> None:
    face = ast.parse((ROOT / "pipeline" / "requant" / name / "__init__.py").read_text())
    shown = {
        a.name
        for n in face.body
        if isinstance(n, ast.ImportFrom) and n.module == f"requant.{name}.stage"
        for a in n.names
    }
    assert shown == {"verify" if name == "deploy" else name}
    assert "<- start here" in (ast.get_docstring(face) or "")


@pytest.mark.parametrize("package", sorted(m for m, f in MODULES.items() if f.name == "__init__.py" and m not in DOORS))
def test_a_face_names_every_file_of_its_package(package: str) -> None:
    """The plan of the rooms in its docstring is complete."""
    folder = MODULES[package].parent
    plan = ast.get_docstring(ast.parse(MODULES[package].read_text())) or ""
    inside = {f.stem for f in folder.glob("*.py")} | {d.parent.name for d in folder.glob("*/__init__.py")}
    listed = {
        w.strip(",") for line in plan.splitlines() if line.startswith("    ") for w in line.split("   ")[1].split()
    }
    assert inside - {"__init__"} == listed
    assert "<- start here" in plan


def functions(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(MODULES))
def test_sizes(module: str) -> None:
    """No function over 50 lines, no file over 320, no line over 120 columns."""
    file = MODULES[module]
    assert [line for line in file.read_text().splitlines() if len(line) > 120] == []
    assert len(file.read_text().splitlines()) <= 320
    assert [(n, size) for n, size in functions(file) if size > 50] == []


BESIDE = sorted(file for folder in ("bench", "docs", "tests") for file in (ROOT / folder).rglob("*.py"))


def test_files_beside_the_packages_are_found() -> None:
    assert {f.relative_to(ROOT).parts[0] for f in BESIDE} == {"bench", "docs", "tests"}


@pytest.mark.parametrize("file", [str(f.relative_to(ROOT)) for f in (*FILES, *BESIDE) if f.read_text()])
def test_every_file_says_what_it_is(file: str) -> None:
    first = (ast.get_docstring(ast.parse((ROOT / file).read_text())) or "").split("\n")[0]
    assert first
    assert len(first) <= 90, f"{len(first)} characters"


# They import nothing of ours.
OF_OTHER_PROCESSES = {f"requant.deploy.engine_{name}" for name in ("vllm", "transformers", "llamacpp", "mlx")}
OF_OTHER_PROCESSES |= {"requant.tracking.clients"}
READERS = {"json.load", "json.loads", "json.JSONDecoder"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - OF_OTHER_PROCESSES - {"requant_eval.strict_json"}))
def test_json_is_read_in_one_place(module: str) -> None:
    """Python's own reader takes what no other does, and raises what nobody expects."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        found = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if isinstance(node, ast.ImportFrom) and node.module == "json":
            found = "from json import"
        assert found not in READERS | {"from json import"}, f"{module}:{node.lineno}: read it by strict_json"


HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets")


@pytest.mark.slow
@pytest.mark.parametrize(
    "face", ["requant.cli", "requant.recipe", "requant_eval", "requant_eval.report", "requant_eval.scoring"]
)
def test_faces_that_start_at_once(face: str) -> None:
    """`requant --help`, a recipe's error and a report need no torch."""
    code = f"import sys, {face}\nprint(sorted(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT / "pipeline",
        env={"PYTHONPATH": f"{ROOT / 'pipeline'}:{ROOT / 'eval'}", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr

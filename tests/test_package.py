"""Wheel and sdist hold all that the installed commands need, and say what they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from helpers.reports import built
from trove_classifiers import classifiers  # comes with hatchling

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def built_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist); the wheel is built from the sdist, as an installer would from an index."""
    out = tmp_path_factory.mktemp("dist")
    run(["-m", "hatchling", "build", "-t", "sdist", "-d", str(out)], ROOT)
    (sdist,) = out.glob("*.tar.gz")
    shutil.unpack_archive(sdist, out)
    run(["-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], out / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = out.glob("*.whl")
    return wheel, sdist


def run(arguments: list[str], cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources() -> set[str]:
    """Every file of both packages, as a wheel names them."""
    found = {file.relative_to(ROOT / "pipeline") for file in (ROOT / "pipeline").rglob("*") if file.is_file()}
    found |= {file.relative_to(ROOT / "eval") for file in (ROOT / "eval").rglob("*") if file.is_file()}
    return {str(file) for file in found if "__pycache__" not in file.parts}


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(built_files: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built_files[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == sources()
    assert {"requant/py.typed", "requant_eval/py.typed", "requant_eval/render/templates/page.html"} <= names


@pytest.mark.slow
def test_the_metadata_is_complete(built_files: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built_files[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        data = Parser().parsestr(wheel.read(name).decode())
        entry = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert (data["Name"], data["License-Expression"], data["Requires-Python"]) == ("requant", "Apache-2.0", ">=3.11")
    assert "Typing :: Typed" in data.get_all("Classifier", [])
    assert set(data.get_all("Classifier", [])) <= classifiers
    assert {"gptqmodel", "gguf", "tasks", "track", "dev", "demo", "docs"} <= set(data.get_all("Provides-Extra", []))
    assert "requant = requant.__main__:main" in entry
    assert data["Description-Content-Type"] == "text/markdown"
    with tarfile.open(built_files[1]) as sdist:
        inside = {member.split("/", 1)[1] for member in sdist.getnames() if "/" in member}
    assert {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "constraints.txt",
        "Makefile",
        "docs/recipe.md",
        "AGENTS.md",
    } <= inside
    assert not [name for name in inside if name.startswith(("runs/", ".venv", "site/")) or "/work/base" in name]


@pytest.mark.slow
def test_the_installed_wheel_works_away_from_the_sources(built_files: tuple[Path, Path], tmp_path: Path) -> None:
    """Into a directory of its own, the sources out of reach: version, schema, starter recipe, and a report's templates."""
    site = tmp_path / "site"
    run(
        ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site), str(built_files[0])], ROOT
    )
    assert os.access(site / "bin" / "requant", os.X_OK)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}'
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text(json.dumps(built(gates=())))

    def requant(*arguments: str) -> str:
        script = (
            "import sys; import requant, requant_eval; "
            f"assert requant.__file__.startswith({str(site)!r}) and requant_eval.__file__.startswith({str(site)!r}); "
            "from requant.__main__ import main; main()"
        )
        return run(["-c", script, *arguments], tmp_path, PYTHONPATH=str(site), HF_HUB_OFFLINE="1")

    assert requant("--version").startswith("requant ")
    assert json.loads(requant("schema"))["title"] == "requant recipe"
    assert "name: adapter-w4g128" in requant("init", "adapter")
    requant("report", "run")
    assert "<html" in (tmp_path / "run" / "report.html").read_text()

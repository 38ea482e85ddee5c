"""Local tasks for tests: those of recipes/tasks, with data made here."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "tasks"
HAS_LIBRARY = importlib.util.find_spec("lm_eval") is not None
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="needs lm-evaluation-harness: pip install lm-eval")


def make(folder: Path) -> Path:
    """Both tasks and their data in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in FOLDER.glob("*.yaml"):
        shutil.copy(file, folder)
    spec = importlib.util.spec_from_file_location("make_task_data", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(folder)
    return folder

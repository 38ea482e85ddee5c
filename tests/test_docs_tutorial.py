"""docs/tutorial.ipynb: every cell of it runs, on a model of two layers; it holds no outputs."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.e2e import LENGTH

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "tutorial.ipynb"
NOTEBOOK = json.loads(FILE.read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def parameters() -> dict[str, Any]:
    """The cell of settings: the one that a run may change."""
    (cell,) = [cell for cell in CODE if "parameters" in cell["metadata"].get("tags", [])]
    names: dict[str, Any] = {}
    exec(compile(source(cell), "parameters", "exec"), names)
    return {name: value for name, value in names.items() if name.isupper()}


def test_the_notebook_holds_no_outputs_and_its_cells_are_python() -> None:
    assert len(CODE) >= 8
    for cell in CODE:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        if not source(cell).startswith("%%bash"):
            ast.parse(source(cell))


@pytest.mark.slow
def test_every_cell_runs(project: Path, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="no nbclient here (make setup installs it)")
    pytest.importorskip("ipykernel", reason="no ipykernel here (make setup installs it)")
    import nbformat

    small = {
        "BASE": str(project / "original"), "LENGTH": LENGTH, "SAMPLES": 8, "GROUP_SIZE": 32, "STEPS": 3, "BATCH": 2,
        "NF4": {"quant_type": "nf4", "double_quant": True, "load_dtype": "bfloat16"},
    }  # fmt: skip
    assert small.keys() <= parameters().keys()
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    changed = "\n".join(f"{name} = {value!r}" for name, value in small.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(changed))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=environment)  # raises for the first cell that fails

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(CODE) + 2))
    printed = "\n".join(output.get("text", "") for cell in cells for output in cell.outputs)
    report = json.loads((tmp_path / "runs" / "tutorial" / "report.json").read_text())
    assert report["headline"] in printed
    assert report["verdict"]["line"] in printed
    assert "base + adapter: '" in printed
    assert "gptq: '" in printed
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    rich = [output.data for cell in cells for output in cell.outputs if "data" in output]
    assert [data["text/markdown"] for data in rich if "text/markdown" in data] == [
        (tmp_path / "runs" / "tutorial" / "report.md").read_text()
    ]

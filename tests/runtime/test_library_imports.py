"""What a run imports: nothing that no run uses, and other code still finds it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import e2e

ROOT = Path(__file__).resolve().parents[2]
ROOTS = {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("pipeline", "eval"))}
NEEDLESS = (
    "scipy", "torchao", "sklearn", "pandas", "pyarrow", "datasets", "gptqmodel", "lm_eval", "triton.testing",
    "torch._inductor.compile_fx", "torch._inductor.lowering",
)  # fmt: skip
NEEDED = ("bitsandbytes", "peft", "transformers.modeling_utils", "requant.quantize.stage", "requant_eval.render.html")
LISTED = """
import atexit, sys
from requant.cli import main
atexit.register(lambda: print("LOADED", *sys.modules))
main()
"""


def python(script: str, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *words], cwd=cwd, env=os.environ | ROOTS, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_whole_run_imports_nothing_that_it_does_not_use(project: Path, tmp_path: Path) -> None:
    copy = e2e.copied(project, tmp_path / "project")
    done = python(LISTED, "run", "recipe.yaml", cwd=copy)
    assert "report done" in done.stdout, done.stderr
    loaded = done.stdout.partition("LOADED")[2].split()
    assert set(NEEDED) <= set(loaded), "the list of modules is real"
    assert not set(NEEDLESS) & set(loaded)


AFTER = """
import gc, sys
from requant.runtime import library_imports
with library_imports.importing():
    library_imports.load_model_code()
print("scipy" in sys.modules, gc.isenabled(), gc.get_freeze_count() > 100_000 and library_imports.froze())
import torch, transformers.models.llama.modeling_llama
from transformers.utils import is_scipy_available
compiles = torch.compile
library_imports.load_training_libraries()
print(is_scipy_available(), torch.compile is compiles)
import scipy.optimize
"""


@pytest.mark.slow
def test_what_was_left_out_is_found_afterwards() -> None:
    pytest.importorskip("scipy")
    done = python(AFTER)
    assert done.stdout.split() == ["False", "True", "True", "True", "True"], done.stderr


def test_hidden_packages_are_back_after_an_error() -> None:
    from requant.runtime import library_imports

    with pytest.raises(ImportError), library_imports.hidden("tabnanny"):
        import tabnanny
    import tabnanny  # noqa: F401


def test_nothing_is_frozen_where_the_model_code_is_there_already() -> None:
    import transformers.modeling_utils  # noqa: F401

    from requant.runtime import library_imports

    before = gc.get_freeze_count()
    with library_imports.importing():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before

"""`requant.deploy.gguf_verification`: files that are whole, damaged, or of another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers import pico
from helpers.e2e import edit_tensors, make_model, one_thread

from requant.deploy import engine_processes
from requant.deploy.gguf_export import export
from requant.deploy.gguf_verification import gguf_file, verify_gguf
from requant.deploy.own_scores import score_rows
from requant.errors import InputError
from requant.evaluate import variants
from requant.numerics.grid import Grid


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A GGUF file, out/model-Q4_0.gguf, beside its source, gptq/."""
    make_model(tmp_path / "model", hidden=128)
    pico.packed(tmp_path / "model", tmp_path / "gptq", Grid(4, 32), dtype=torch.bfloat16)
    return tmp_path / "out" / export(tmp_path / "gptq", tmp_path / "out").file


def edit(file: Path, name: str, offset: int, values: bytes) -> None:
    """Write bytes into the data of one tensor."""
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == name)
    with file.open("r+b") as handle:
        handle.seek(int(tensor.data_offset) + offset)
        handle.write(values)


def test_a_whole_file_is_its_source(made: Path, tmp_path: Path) -> None:
    done = verify_gguf(made, source=tmp_path / "gptq")
    assert (done.findings, done.largest_rounding, done.skipped) == ([], 0, [])
    assert (done.linears, done.bits_per_weight) == (14, 4.5)
    assert done.disk_bytes == made.stat().st_size
    alone = verify_gguf(made)
    assert (alone.ok, alone.largest_rounding) == (True, None)
    assert alone.skipped == ["comparison with its source: --against CHECKPOINT names the quantized one"]


def test_an_engines_scores_are_compared_with_those_of_the_source(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for llama.cpp answers with our own scores, moved; the real one is in test_llama_cpp.py."""
    moved, asked = [0.02, 0.2], list[Path]()

    def ask(engine: str, path: Path, rows: Any, *, dtype: str, **_: Any) -> engine_processes.Answer:
        model = variants.quantized(tmp_path / "gptq", device=torch.device("cpu"), dtype=torch.float32)
        nll, _ = score_rows(model, rows, torch.device("cpu"))
        asked.append(path)
        scores = tuple(tuple(x + moved[0] for x in row) for row in nll)
        return engine_processes.Answer(engine=engine, dtype=dtype, kernels=("llama.cpp",), nll=scores, generated=(1,))

    monkeypatch.setattr(engine_processes, "require", lambda _: "python")
    monkeypatch.setattr(engine_processes, "ask", ask)
    with one_thread():
        done = verify_gguf(made, source=tmp_path / "gptq", load_in=["llamacpp"])
        assert done.ok
        assert (done.engines[0]["ok"], done.engines[0]["dtype"], asked) == (True, "int8", [made])
        assert done.perplexity is not None
        moved.pop(0)
        (finding,) = verify_gguf(made, source=tmp_path / "gptq", load_in=["llamacpp"]).findings
    assert str(finding) == (
        "llamacpp: reads other weights (llama.cpp): its mean -ln p is +0.2 from ours, 0.1 is its rounding"
    )


def test_minima_of_q4_1_are_rounded_and_nothing_else(tmp_path: Path) -> None:
    make_model(tmp_path / "model", hidden=128)
    pico.packed(tmp_path / "model", tmp_path / "gptq", Grid(4, 32, symmetric=False), dtype=torch.bfloat16)
    file = tmp_path / "out" / export(tmp_path / "gptq", tmp_path / "out").file
    done = verify_gguf(file, source=tmp_path / "gptq")
    assert done.ok
    assert done.largest_rounding is not None
    assert 0 < done.largest_rounding < 2**-7
    edit(file, "blk.1.ffn_up.weight", 2, np.float16(0.5).tobytes())  # one minimum
    (finding,) = verify_gguf(file, source=tmp_path / "gptq").findings
    assert str(finding) == "blk.1.ffn_up.weight: does not decode to its source"


def test_one_code_and_one_value_that_are_not_the_sources_are_found(made: Path, tmp_path: Path) -> None:
    tensor = next(t for t in gguf.GGUFReader(made).tensors if t.name == "blk.0.attn_q.weight")
    edit(made, "blk.0.attn_q.weight", 2, bytes([int(np.array(tensor.data).flat[2]) ^ 1]))
    edit(made, "blk.1.attn_norm.weight", 0, np.float32(3).tobytes())
    assert verify_gguf(made).ok, "without the source nothing tells"
    findings = verify_gguf(made, source=tmp_path / "gptq").findings
    assert sorted(f.where for f in findings) == ["blk.0.attn_q.weight", "blk.1.attn_norm.weight"]
    assert {f.reason for f in findings} == {"does not decode to its source"}


def test_values_that_are_not_finite_are_found_without_a_source(made: Path, tmp_path: Path) -> None:
    edit(made, "blk.0.ffn_down.weight", 0, np.float16(np.inf).tobytes())
    edit(made, "output_norm.weight", 4, np.float32(np.nan).tobytes())
    found = {f.where: f.reason for f in verify_gguf(made).findings}
    assert found == {
        "blk.0.ffn_down.weight": "32 of 32768 values are not finite",
        "output_norm.weight": "1 of 128 values are not finite",
    }
    assert not verify_gguf(made, source=tmp_path / "gptq").ok


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -1])
def test_a_file_that_was_cut_short(made: Path, keep: int) -> None:
    made.write_bytes(made.read_bytes()[:keep])
    (finding,) = verify_gguf(made).findings
    assert finding.where == made.name
    assert finding.reason.startswith("is no whole GGUF file (")


def test_another_models_file_and_files_that_are_not_there(made: Path, tmp_path: Path) -> None:
    edit_tensors(
        tmp_path / "gptq" / "model.safetensors", lambda t: t | {"model.norm.weight": t["model.norm.weight"] * 2}
    )
    (finding,) = verify_gguf(made, source=tmp_path / "gptq").findings
    assert str(finding) == "output_norm.weight: does not decode to its source"
    with pytest.raises(InputError, match=r"none\.gguf: no such file"):
        verify_gguf(tmp_path / "none.gguf")
    assert gguf_file(made) == gguf_file(made.parent) == made
    assert gguf_file(tmp_path / "gptq") is None
    (made.parent / "second.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds 2 GGUF files, model-Q4_0\.gguf and others: name one"):
        gguf_file(made.parent)

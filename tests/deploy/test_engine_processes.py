"""Tests of `requant.deploy.engine_processes`: real loads, refusals, broken interpreters."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import pico
from helpers.e2e import one_thread, run

from requant import deploy
from requant.deploy import engine_processes
from requant.deploy.engine_processes import Answer
from requant.errors import InputError, StageError
from requant.evaluate import variants


def test_agreement_is_the_log_ratio_of_perplexities_within_the_rounding_of_the_dtype() -> None:
    ours = [[1.0, 2.0], [3.0]]
    answer = Answer(engine="vllm", dtype="bfloat16", nll=((1.0, 2.0), (3.03,)))
    assert answer.difference(ours) == pytest.approx(0.01)
    assert answer.agrees(ours)
    assert not Answer(engine="vllm", dtype="float32", nll=answer.nll).agrees(ours)
    assert not Answer(engine="vllm", dtype="bfloat16", nll=((1.0, 2.0), (float("nan"),))).agrees(ours)
    assert not Answer(engine="vllm", dtype="bfloat16", error="OutOfMemoryError: no").agrees(ours)


def test_the_interpreter_is_the_environments_then_the_projects_then_this(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUANT_VLLM_PYTHON", raising=False)
    assert engine_processes.interpreter("transformers", tmp_path) == sys.executable
    if engine_processes.interpreter("vllm", tmp_path) is None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            InputError, match=r"vllm is not installed here: make setup-vllm, .* set REQUANT_VLLM_PYTHON"
        ):
            engine_processes.require("vllm")
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert engine_processes.interpreter("vllm", tmp_path) == str(python)
    monkeypatch.setenv("REQUANT_VLLM_PYTHON", "/elsewhere/python")
    assert engine_processes.interpreter("vllm", tmp_path) == "/elsewhere/python"
    with pytest.raises(InputError, match=r"/elsewhere/python: cannot be started .*: set REQUANT_VLLM_PYTHON"):
        engine_processes.ask("vllm", tmp_path, [[1, 2]], dtype="bfloat16")


def test_a_run_asks_the_engines_it_is_for_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        engine_processes, "interpreter", lambda engine, directory=None: "python" if engine == "vllm" else None
    )
    assert engine_processes.installed(("vllm", "sglang", "transformers")) == ["vllm"]
    assert engine_processes.installed(()) == []


def test_an_engine_sees_no_token(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "RESULT $(env | grep -c _TOKEN)" >&2\nexit 3\n')
    script.chmod(0o755)
    monkeypatch.setenv("REQUANT_VLLM_PYTHON", str(script))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    answer = engine_processes.ask("vllm", good, [[1, 2]], dtype="bfloat16")
    assert answer.error == "RESULT 0 (exit 3)"


def test_the_reason_is_the_exception_also_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho '[rank0]: ValueError: no such name: x' >&2\necho 'Loading: 0%' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("REQUANT_VLLM_PYTHON", str(script))
    assert (
        engine_processes.ask("vllm", tmp_path, [[1, 2]], dtype="bfloat16").error
        == "ValueError: no such name: x (exit 1)"
    )


def test_verify_asks_for_engines_first(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing engine is a wrong command, known before anything is read."""
    monkeypatch.setattr(engine_processes, "interpreter", lambda engine, directory=None: None)
    with pytest.raises(InputError, match="transformers is not installed here: pip install gptqmodel optimum"):
        deploy.verify(good, load_in=["transformers"])


@pytest.fixture
def gptqmodel() -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")


@pytest.mark.slow
@pytest.mark.usefixtures("gptqmodel")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_the_same_numbers(good: Path, source: Path, dtype: str) -> None:
    with one_thread():
        done = deploy.verify(good, source=source, load_in=["transformers"], engine_dtype=dtype)
    assert done.ok, done.message()
    row = done.engines[0]
    assert row["ok"] is True
    assert row["kernels"], "really packed modules"
    assert abs(row["difference"]) <= engine_processes.TOLERANCE[dtype]
    assert {"transformers", "gptqmodel", "optimum", "torch"} <= row["versions"].keys()
    if dtype == "float32":
        assert row["same_tokens"] is True
    json.dumps(done.facts())


@pytest.mark.slow
@pytest.mark.usefixtures("gptqmodel")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_the_logits_of_transformers_are_those_of_our_decoding(good: Path, dtype: torch.dtype, bound: float) -> None:
    """transformers as users load it against our decoding in fp32.

    In fp32 sums differ in their order, in bf16 by 8 bits.
    """
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(good, dtype=dtype, device_map={"": "cpu"}).eval()
    assert sum(hasattr(m, "qweight") for m in loaded.modules()) == 14, "packed, not plain linears"
    ours = variants.quantized(good, device=torch.device("cpu"), dtype=torch.float32)
    with one_thread():
        assert pico.relative(pico.logits(loaded), pico.logits(ours)) < bound
        made = loaded.generate(pico.ids(1, 8), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 12)


@pytest.mark.slow
@pytest.mark.usefixtures("gptqmodel")
def test_a_kernel_that_cannot_run_here_is_an_answer(good: Path) -> None:
    """Marlin needs a GPU: the library's own error, not ours."""
    with one_thread():
        answer = engine_processes.ask(
            "transformers", good, [[5, 6, 7, 8] * 8], dtype="float32", backend="gptq_marlin", threads=1
        )
    assert answer.error is not None
    assert "(exit 1)" in answer.error


@pytest.mark.slow
@pytest.mark.usefixtures("gptqmodel")
def test_a_recipe_that_names_an_engine_has_it_load_what_it_wrote(project: Path, tmp_path: Path) -> None:
    """deploy: the table judges before the work, the engine loads after it; the report has both.

    With an interval.
    """
    out = run(
        project, tmp_path, {"deploy": ["transformers"], "evaluate.variants": ["base", "adapter", "merged", "gptq"]}
    )
    assert out.report["facts"]["quantize"]["engines"]["transformers"]["loads"] is True
    proof = out.report["facts"]["verify"]
    assert proof["ok"] is True
    (row,) = proof["engines"]
    assert (row["engine"], row["dtype"], row["n_documents"]) == ("transformers", "float32", 20)
    assert row["tokens_per_second"] > 0
    home = next(s for s in out.report["sets"] if s["in_domain"])
    (step,) = home["kernels"]
    assert (step["from"], step["to"]) == ("gptq", "transformers")
    assert abs(step["delta"]["value"]) <= engine_processes.TOLERANCE["float32"]
    assert step["delta"]["low"] is not None
    text = (out.path / "report.md").read_text()
    assert re.search(r"\| gptq -> transformers \|.*\| served in float32 on cpu, 20 documents \|", text)
    assert "transformers " in (out.path / "report.md").read_text().split("### Ways to deploy")[1].split("###")[0]


@pytest.mark.slow
@pytest.mark.usefixtures("gptqmodel")
def test_a_checkpoint_that_its_engine_misreads_is_not_put_in_place(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        engine_processes,
        "ask",
        lambda engine, *_, **__: Answer(engine=engine, dtype="float32", error="ValueError: no kernel"),
    )
    with pytest.raises(StageError, match=r"transformers: does not load it: ValueError: no kernel"):
        run(project, tmp_path, {"deploy": ["transformers"]}, until="quantize")
    assert not (tmp_path / "pico" / "gptq").exists()

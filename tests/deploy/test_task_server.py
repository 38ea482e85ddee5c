"""Tasks through vLLM: the server's process, and a whole run in a real one (make test-vllm)."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import e2e, pico
from helpers import tasks as local

from requant.deploy import engine_processes
from requant.deploy.task_server import VllmServer
from requant.errors import InputError, StageError
from requant.evaluate import variants
from requant.numerics.grid import Grid
from requant.run import prepare

ROOT = Path(__file__).resolve().parents[2]
REAL = engine_processes.interpreter("vllm", ROOT)
CPU = torch.device("cpu")
LOADED = 'RESULT {"versions": {"vllm": "9.9", "torch": "2"}, "kernels": ["Marlin"]}'
needs_vllm = pytest.mark.skipif(REAL is None, reason="no vLLM here: make setup-vllm")


def server(path: Path, longest: int = 64) -> VllmServer:
    return VllmServer(path, device=CPU, longest=longest, trust_remote_code=False)


def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """A program in the place of vLLM's Python."""
    script = tmp_path / "python"
    script.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    script.chmod(0o755)
    monkeypatch.setenv("REQUANT_VLLM_PYTHON", str(script))


def test_requests_and_answers_are_lines(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"
    instead(
        tmp_path, monkeypatch, "echo some words of the library", f"head -n1 > {seen}; echo '{LOADED}'",
        """read -r line; echo "$line" > SEEN2; echo 'RESULT {"scores": [[-1.5, true]]}'""".replace("SEEN2", f"{seen}2"),
        """read -r line; echo 'RESULT {"tokens": [[4, 1]]}'""",
    )  # fmt: skip
    with server(source) as running:
        assert running.described == "vllm 9.9, float32, Marlin".replace("float32", running.dtype)
        assert running.scores([([3, 4, 5], 2)]) == [(-1.5, True)]
        assert running.continuations([[3]], new_tokens=2, until=["."], stops=[1]) == [[4, 1]]
    assert json.loads(seen.read_text())["longest"] == 64
    assert json.loads((tmp_path / "seen2").read_text()) == {"score": [[[3, 4, 5], 2]]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["echo 'ValueError: no such kernel' >&2", "exit 1"], r"ValueError: no such kernel \(exit 1\): set evaluate"),
        (["read -r line", "echo RESULT {"], "its answer is"),
    ],
)
def test_a_server_that_does_not_answer_says_why(
    lines: list[str], message: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead(tmp_path, monkeypatch, *lines)
    with pytest.raises(StageError, match=message), server(source):
        pass


@local.needs_library
@pytest.mark.slow
def test_without_vllm_the_recipe_is_refused(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_processes, "interpreter", lambda *_: None)
    file = local.make(tmp_path / "tasks") / "python_functions.yaml"
    changes = {"evaluate.tasks": [str(file)], "evaluate.task_backend": "vllm"}
    with pytest.raises(InputError, match=r"evaluate\.task_backend: vllm is not installed here: make setup-vllm"):
        prepare.prepare(e2e.recipe(project, tmp_path, changes))


# --- in a real vLLM ---


@pytest.mark.vllm
@needs_vllm
def test_vllm_scores_and_continues_as_our_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUANT_VLLM_PYTHON", str(REAL))
    e2e.make_model(tmp_path / "model", hidden=256)  # heads of 64: what its attention kernels take
    pico.packed(tmp_path / "model", tmp_path / "gptq", Grid(4, 32), dtype=torch.bfloat16)
    rows = [([5, 6, 7, 8, 9, 10, 11, 12], 1), ([30, 31, 32, 33], 2)]
    model = variants.quantized(tmp_path / "gptq", device=CPU, dtype=torch.float32)
    with server(tmp_path / "gptq", longest=8) as running:
        found = running.scores(rows)
        long, short = running.continuations([[5, 6, 7], [8, 9]], new_tokens=5, until=[], stops=[])
        stopped = running.continuations([[5, 6, 7]], new_tokens=5, until=[], stops=[long[1]])
    for (total, greedy), (ids, first) in zip(found, rows, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [float(log_p[i - 1, ids[i]]) for i in range(first, len(ids))]
        assert abs(total - math.fsum(own)) / len(own) < engine_processes.TOLERANCE["bfloat16"]
        assert not greedy, "chosen at random of a vocabulary"
    assert (len(long), len(short)) == (5, 5)
    assert stopped == [long[:2]], "the stop token is the last"


@pytest.mark.vllm
@needs_vllm
@local.needs_library
def test_a_run_asks_vllm_for_what_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUANT_VLLM_PYTHON", str(REAL))
    with e2e.one_thread():
        project = e2e.make_project(tmp_path / "project", hidden=256)
    folder = local.make(tmp_path / "tasks")
    changes: dict[str, Any] = {
        "evaluate.tasks": [
            {"path": str(folder / "python_functions.yaml"), "limit": 20},
            {"path": str(folder / "word_problems.yaml"), "limit": 4, "few_shot": 1},
        ],
        "evaluate.variants": ["base", "adapter", "merged", "gptq"],
        "evaluate.task_backend": "vllm",
    }
    done = e2e.run(project, tmp_path, changes)
    choice, written = done.report["tasks"]
    assert re.search(
        r"; merged in vllm\S* \S+, bfloat16; gptq in vllm\S* \S+, bfloat16, .*Kernel\)$", choice["version"]
    )
    assert {name: len(of) for name, of in choice["documents"].items()} == {"adapter": 20, "merged": 20, "gptq": 20}
    assert {name: len(of) for name, of in written["documents"].items()} == {"adapter": 4, "merged": 4, "gptq": 4}
    assert e2e.run(project, tmp_path, changes).ran == []
    own = e2e.run(project, tmp_path, changes | {"evaluate.task_backend": "transformers"})
    assert own.ran == ["tasks", "report"], "another backend's results are others"
    same = own.report["tasks"][0]["documents"]
    assert same["adapter"] == choice["documents"]["adapter"]
    agree = sum(a == b for a, b in zip(same["merged"], choice["documents"]["merged"], strict=True))
    assert agree >= 15, "random models near ties may choose otherwise in 16 bits"

"""Our checkpoints in a real vLLM, started as users start it.

Run by `make test-vllm`; skipped without `.venv-vllm`.

The demo's checkpoint is served too when `make demo` has been run (or REQUANT_DEMO names its run directory).
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import make_model, make_project, make_tokenizer, one_thread, run, texts
from helpers.loading import runtime_names
from safetensors.torch import load_file, save_file

from requant import deploy
from requant.deploy import engine_processes, engine_support, engine_targets, tensor_parallel
from requant.deploy.conversion import convert
from requant.deploy.own_scores import SAMPLE
from requant.evaluate import variants
from requant.heal.settings import HealSettings
from requant.modeling import skeleton
from requant.numerics.grid import Grid
from requant.run import heal_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PYTHON = engine_processes.interpreter("vllm", ROOT)
DEMO = Path(os.environ.get("REQUANT_DEMO", ROOT / "runs" / "smollm2-pydocs-w4g64"))
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="no vLLM here: make setup-vllm"),
]


@pytest.fixture(autouse=True)
def where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUANT_VLLM_PYTHON", str(PYTHON))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    make_model(out, hidden=256)  # heads of 64: what its attention kernels take
    return out


@pytest.mark.parametrize(
    "grid",
    [Grid(4, 32), Grid(4, 64), Grid(4, 128), Grid(4, 64, signed=True), Grid(4, -1)],
    ids=["g32", "g64", "g128", "g64 signed", "row"],
)
def test_vllm_reads_our_numbers(source: Path, tmp_path: Path, grid: Grid) -> None:
    pico.packed(source, tmp_path / "gptq", grid, dtype=torch.bfloat16)
    done = deploy.verify(tmp_path / "gptq", source=source, load_in=["vllm"])
    assert done.ok, done.message()
    row = done.engines[0]
    assert row["dtype"] == "bfloat16"
    assert row["kernels"], "packed layers, not plain ones"
    assert abs(row["difference"]) < engine_processes.TOLERANCE["bfloat16"]


@pytest.mark.parametrize(
    ("grid", "overrides"),
    [(Grid(4, 64), (("*.layers.0.*", {"group_size": 32}),)), (Grid(4, 64, symmetric=False), (("*.layers.0.*", None),))],
    ids=["groups of two sizes", "asymmetric beside 16 bit"],
)
def test_vllm_reads_the_same_numbers_as_compressed_tensors(
    source: Path, tmp_path: Path, grid: Grid, overrides: tuple[Any, ...]
) -> None:
    pico.packed(source, tmp_path / "gptq", grid, dtype=torch.bfloat16, overrides=overrides)
    convert(tmp_path / "gptq", tmp_path / "ct", "compressed-tensors")
    done = deploy.verify(tmp_path / "ct", source=source, load_in=["vllm"])
    assert done.ok, done.message()
    row = done.engines[0]
    assert row["kernels"] == ["CompressedTensorsLinearMethod/CPUWNA16LinearKernel"]
    assert abs(row["difference"]) < engine_processes.TOLERANCE["bfloat16"]


def test_vllm_reads_healed_numbers(source: Path, tmp_path: Path) -> None:
    pico.packed(source, tmp_path / "gptq", Grid(4, 64), dtype=torch.bfloat16)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(texts()["train"]))
    settings = HealSettings(steps=5, batch=2, length=32, lr=3e-3)
    with one_thread():
        told = heal_checkpoint.heal_checkpoint(
            tmp_path / "gptq", source, [text], tmp_path / "healed", settings, device=torch.device("cpu")
        )
    assert told["healed"]
    done = deploy.verify(tmp_path / "healed", source=source, load_in=["vllm"])
    assert done.ok, done.message()
    assert abs(done.engines[0]["difference"]) < engine_processes.TOLERANCE["bfloat16"]


@pytest.mark.parametrize("grid", [Grid(4, 64, symmetric=False), Grid(8, 64)], ids=["asymmetric", "8 bit on a CPU"])
def test_vllm_refuses_what_the_table_of_servers_says(source: Path, tmp_path: Path, grid: Grid) -> None:
    planned = pico.packed(source, tmp_path / "gptq", grid)
    judged = engine_support.judge(planned, skeleton.open_model(source), engine_targets.TARGETS["vllm"])
    assert "CPU" in judged.lacking
    done = deploy.verify(tmp_path / "gptq", load_in=["vllm"])
    assert [f.where for f in done.findings] == ["vllm"]
    assert done.findings[0].reason.startswith("does not load it: ")


def wide_mixtral(out: Path) -> Path:
    """A Mixtral in 16 bit: vLLM's CPU kernel for quantized experts needs AMX.

    The names are needed all the same.
    """
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    pico.save(pico.model("mixtral", **sizes), out, torch.bfloat16)
    pico.save_tokenizer(out)
    return out


def test_vllm_reads_mixtrals_original_names_and_no_others(tmp_path: Path) -> None:
    """vLLM needs the original names, gptqmodel's loader those of transformers 5.

    For that loader see tests/merge/test_roundtrip.py.
    """
    path = wide_mixtral(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in tensors
    rows = pico.ids(2, 24).tolist()
    with one_thread(), torch.no_grad():
        ours = pico.reload(path)(input_ids=torch.tensor(rows)).logits[:, :-1].flatten(0, 1).float()
        nll = torch.nn.functional.cross_entropy(ours, torch.tensor(rows)[:, 1:].flatten(), reduction="none")
    answer = engine_processes.ask("vllm", path, rows, dtype="bfloat16")
    assert answer.agrees([nll.tolist()]), answer
    save_file(runtime_names(tensors), path / "model.safetensors", metadata={"format": "pt"})
    refused = engine_processes.ask("vllm", path, rows, dtype="bfloat16")
    assert refused.error is not None
    assert "no module or parameter named 'layers.0.mlp'" in refused.error


@pytest.mark.parametrize(
    ("kind", "changes"), [("granitemoe", {}), ("gpt_oss", {"intermediate_size": 128, "head_dim": 64})]
)
def test_vllm_reads_experts_that_stay_fused(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """Experts in 16 bit beside quantized attention: a rule in the config says so."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 300}
    source = pico.save(pico.model(kind, **sizes, **changes), tmp_path / "model", torch.bfloat16)
    make_tokenizer(source)
    pico.packed(source, tmp_path / "gptq", Grid(4, 32), dtype=torch.bfloat16)
    with one_thread():
        done = deploy.verify(tmp_path / "gptq", source=source, load_in=["vllm"])
    assert done.ok, done.message()
    assert any("CPUWNA16" in kernel for kernel in done.engines[0]["kernels"])


def test_a_recipe_for_vllm_has_vllm_load_what_it_wrote(tmp_path: Path) -> None:
    with one_thread():
        project = make_project(tmp_path / "project", hidden=256)
    out = run(project, tmp_path, {"deploy": ["vllm"], "evaluate.variants": ["base", "adapter", "merged", "gptq"]})
    (row,) = out.report["facts"]["verify"]["engines"]
    assert (row["engine"], row["dtype"], row["ok"]) == ("vllm", "bfloat16", True)
    (step,) = next(s for s in out.report["sets"] if s["in_domain"])["kernels"]
    assert (step["from"], step["to"], step["n_documents"]) == ("gptq", "vllm", 20)
    assert step["delta"]["low"] < step["delta"]["high"]
    assert row["tokens_per_second"] > 0
    text = (out.path / "report.md").read_text()
    assert re.search(r"\| gptq -> vllm \|.*\| served in bfloat16 on cpu, 20 documents \|", text)


# Runs in vLLM's interpreter: its own kernels' word on one GPU's part of a matrix, as on a Hopper GPU.
ASK = """
import json, sys
from types import SimpleNamespace
import torch
from vllm.model_executor.kernels.linear.mixed_precision import machete, marlin
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.scalar_type import scalar_types
hopper = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False, is_device_capability=lambda c: True,
                         get_device_capability=lambda *a: None)
marlin.current_platform = machete.current_platform = hopper
marlin.query_marlin_supported_quant_types = lambda *a: [scalar_types.uint4b8, scalar_types.uint8b128]
answers = []
for whole, part, group in json.load(sys.stdin):
    asked = MPLinearLayerConfig(full_weight_shape=tuple(whole), partition_weight_shape=tuple(part), group_size=group,
                                weight_type=scalar_types.uint4b8, act_type=torch.bfloat16, zero_points=False)
    answers.append([k.can_implement(asked)[0] for k in (marlin.MarlinLinearKernel, machete.MacheteLinearKernel)])
print("ANSWERS", json.dumps(answers))
"""


def test_the_table_of_parts_is_vllms_own() -> None:
    """Every split of these matrices by inputs: our rule and kernels against vLLM's kernels."""
    asked, ours = [], []
    offered = {k.name: k for k in engine_targets.TARGETS["vllm"].formats["gptq"].hardware["Hopper"]}
    marlin, machete = offered["Marlin"], offered["Machete"]
    for columns in (256, 576, 1536, 4096, 13824):
        for group in (-1, 32, 64, 128):
            for degree in (1, *tensor_parallel.DEGREES):
                grid = Grid(4, group)
                if columns % max(group, 1) or columns % degree:
                    continue
                part = tensor_parallel.shard_shape("down_proj", 512, columns, degree, None)
                assert part is not None
                fits = tensor_parallel.why_not("down_proj", 512, columns, grid, degree, None) is None
                matrix = engine_targets.Matrix("down_proj", *part, grid)
                asked.append([[columns, 512], [part[1], part[0]], group])
                ours.append([fits and marlin.why_not(matrix) is None, fits and machete.why_not(matrix) is None])
    done = subprocess.run(
        [str(PYTHON), "-c", ASK], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.split("ANSWERS ")[1])
    assert [t[0] for t in theirs] == [o[0] for o in ours]
    # Machete itself does not look at groups, but nothing else takes the matrix there either: Marlin is asked next.
    assert [t[1] and t[0] for t in theirs] == [o[1] for o in ours]
    assert {True, False} <= {o[0] for o in ours}


@contextmanager
def served(path: Path) -> Iterator[str]:
    """vLLM's OpenAI-compatible server on loopback; its whole process group ends with the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    command = [
        str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--served-model-name", "m",
        "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256", "--enforce-eager",
    ]  # fmt: skip
    outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    log = path.parent / "server.log" if os.access(path.parent, os.W_OK) else Path(os.devnull)
    with log.open("w") as out:
        server = subprocess.Popen(command, env=outside | settings, stdout=out, stderr=out, start_new_session=True)
        try:
            _ready(server, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def _ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(300):
        if server.poll() is not None:
            raise AssertionError(f"the server ended with {server.returncode}:\n{log.read_text()[-3000:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError("the server did not answer in five minutes")


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    answer: dict[str, Any] = json.load(urllib.request.urlopen(request, timeout=300))
    return answer


@torch.no_grad()
def ours(path: Path, ids: list[int]) -> float:
    model = variants.quantized(path, device=torch.device("cpu"), dtype=torch.float32)
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))


@pytest.mark.parametrize("which", ["pico", "demo"])
def test_the_server_completes_and_scores_like_us(source: Path, tmp_path: Path, which: str) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "gptq"
    if which == "demo":
        if not (DEMO / "gptq" / "config.json").exists():
            pytest.skip("no checkpoint of the demo here: make demo")
        path.symlink_to(DEMO / "gptq", target_is_directory=True)
    else:
        pico.packed(source, path, Grid(4, 64), dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(path)(SAMPLE)["input_ids"][:240]
    with served(path) as url:
        scored = post(
            f"{url}/v1/completions",
            {"model": "m", "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0},
        )
        made = post(
            f"{url}/v1/completions",
            {"model": "m", "prompt": ids[:16], "max_tokens": 8, "temperature": 0, "logprobs": 0},
        )
    entries = scored["choices"][0]["prompt_logprobs"][1:]
    theirs = [-entry[str(token)]["logprob"] for entry, token in zip(entries, ids[1:], strict=True)]
    with one_thread():
        expected = ours(path, ids)
    mean = sum(theirs) / len(theirs)
    assert math.isfinite(mean)
    assert abs(mean - expected) < engine_processes.TOLERANCE["bfloat16"], (mean, expected)
    assert made["usage"]["completion_tokens"] == 8
    assert made["choices"][0]["text"]

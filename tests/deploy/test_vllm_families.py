"""Checkpoints of many families in a real vLLM; the table of classes against its registry.

Run by `make test-vllm`; skipped without `.venv-vllm`.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import served, sweep
from helpers.e2e import one_thread
from helpers.served import SERVED, Served

from requant.deploy import engine_processes
from requant.deploy.engine_classes import VLLM
from requant.evaluate import variants
from requant.numerics.grid import Grid
from requant.quantize.plan import Settings
from requant.quantize.stage import quantize

ROOT = Path(__file__).resolve().parents[2]
PYTHON = engine_processes.interpreter("vllm", ROOT)
CPU = torch.device("cpu")
AMX = "amx_tile" in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="no vLLM here: make setup-vllm"),
]


def ours(path: Path, rows: list[list[int]]) -> list[list[float]]:
    """-ln p of every token after the first, by our own decoding in fp32."""
    model = variants.quantized(path, device=CPU, dtype=torch.float32)
    ids = torch.tensor(rows)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    scores: list[list[float]] = nll.view(len(rows), -1).tolist()
    return scores


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SERVED, ids=lambda s: s.kind)
def test_vllm_scores_a_family_as_we_do(family: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if family.experts == "quantized" and not AMX:
        pytest.skip("vLLM's kernel for quantized experts on a CPU needs AMX")
    monkeypatch.setenv("REQUANT_VLLM_PYTHON", str(PYTHON))
    source, out = served.build(family, tmp_path / "model"), tmp_path / "gptq"
    out.mkdir()
    settings = Settings(grid=Grid(4, 32), overrides=(("*.experts.*", None),) if family.experts == "in 16 bit" else ())
    with one_thread():
        quantize(source, out, sweep.ids(), settings, dtype=torch.bfloat16, device=CPU, batch=2)
        rows = sweep.ids(5).tolist()
        expected = ours(out, rows)
    answer = engine_processes.ask("vllm", out, rows, dtype="bfloat16")
    assert answer.error is None
    assert answer.agrees(expected), answer.difference(expected)
    assert any(kernel.startswith("AutoGPTQLinearMethod/") for kernel in answer.kernels)
    assert ("AutoGPTQMoEMethod" in answer.kernels) == (family.experts == "quantized")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors"])
def test_experts_in_16_bit_of_widths_that_marlin_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """As gpt-oss, 2,880 wide: in GPTQ vLLM takes them for quantized before it asks the rules."""
    monkeypatch.setenv("REQUANT_VLLM_PYTHON", str(PYTHON))
    family = Served(kind="gpt_oss", experts="in 16 bit", changes={"hidden_size": 192, "head_dim": 64})
    source, out = served.build(family, tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    settings = Settings(grid=Grid(4, 32), overrides=(("*.experts.*", None),), format=layout)
    with one_thread():
        quantize(source, out, sweep.ids(), settings, dtype=torch.bfloat16, device=CPU, batch=2)
        rows = sweep.ids(5).tolist()
        expected = ours(out, rows)
    answer = engine_processes.ask("vllm", out, rows, dtype="bfloat16")
    if layout == "gptq":
        assert "No WNA16 MoE backend supports the deployment configuration" in str(answer.error)
    else:
        assert answer.error is None
        assert answer.agrees(expected), answer.difference(expected)


# Runs in vLLM's interpreter: every tensor of a file goes through the model's own loader, also where the kernels for CPUs
# would refuse the model, and into towers, which vLLM leaves out when only text is asked. Prints what was not filled.
FILL = """
import contextlib, json, sys
from vllm import LLM
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import SupportsMultiModal

for check in ("_supports_routing_method", "_supports_activation"):
    setattr(CPUExpertsInt4, check, staticmethod(lambda *a, **k: True))

@contextlib.contextmanager
def kept(self, *a, **k):
    yield

SupportsMultiModal._mark_tower_model = kept
load = DefaultModelLoader.load_weights

def told(self, model, config):
    inner = model.load_weights
    def loaded(weights):
        done = inner(weights)
        names = [n for n, _ in model.named_parameters() if n not in done and not n.endswith(("w13_bias", "w2_bias"))]
        print("ANSWER", json.dumps(names), flush=True)
        return done
    model.load_weights = loaded
    return load(self, model, config)

DefaultModelLoader.load_weights = told
LLM(model=sys.argv[1], dtype="bfloat16", max_model_len=64, enforce_eager=True, max_num_seqs=4, language_model_only=True)
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not AMX, reason="vLLM's kernel for quantized experts on a CPU needs AMX")
@pytest.mark.parametrize("family", served.FILLED, ids=lambda s: s.kind)
def test_every_parameter_of_vllm_is_filled(family: Served, tmp_path: Path) -> None:
    """With gpt-oss it is not, and nothing says so: hence the table refuses it."""
    source, out = served.build(family, tmp_path / "model"), tmp_path / "gptq"
    out.mkdir()
    with one_thread():
        quantize(source, out, sweep.ids(), Settings(grid=Grid(4, 32)), dtype=torch.bfloat16, device=CPU, batch=2)
    environment = engine_processes.environment("vllm", str(PYTHON), None)
    done = subprocess.run(
        [str(PYTHON), "-c", FILL, str(out)], capture_output=True, text=True, check=False, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stderr[-2000:]
    unfilled = json.loads(lines[0].removeprefix("ANSWER "))
    if family.kind == "gpt_oss":
        assert {name.rpartition(".")[2] for name in unfilled} >= {"w13_qweight", "w2_qweight"}
        assert "GptOssForCausalLM" in VLLM.refuses_experts
    else:
        assert unfilled == []


REGISTRY = """
import json
from vllm.model_executor.models import registry as r
own = [n for d in (r._TEXT_GENERATION_MODELS, r._MULTIMODAL_MODELS) for n in d]
print("ANSWER", json.dumps([own, list(r._TRANSFORMERS_SUPPORTED_MODELS)]))
"""


def test_the_table_of_classes_is_vllms_registry() -> None:
    """The newest for CPUs is a release older than the table: what it has, the table has too."""
    done = subprocess.run([str(PYTHON), "-c", REGISTRY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    own, generic = json.loads(done.stdout.split("ANSWER ")[1])
    assert set(own) <= VLLM.own
    assert set(generic) <= VLLM.generic
    assert len(VLLM.own - set(own)) <= 11
    assert VLLM.refuses.keys() | VLLM.refuses_experts.keys() <= VLLM.own

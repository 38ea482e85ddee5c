"""Every model family through the whole pipeline, on pico models.

NF4 base + adapter -> merged -> GPTQ -> loaded again.

Logits are compared with PEFT's unmerged forward on bitsandbytes' own 4-bit layers, in fp32.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from helpers import pico
from helpers.families import FAMILIES, Family
from safetensors.torch import load_file
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.evaluate import variants
from requant.merge.base_weights import Nf4Settings
from requant.modeling.block_walk import BlockInput
from requant.modeling.blocks import block_list
from requant.numerics.grid import Grid
from requant.quantize.block_quantizer import Quantizer
from requant.quantize.plan import Settings
from requant.quantize.stage import quantize

FP32 = 1e-5  # sums of 64 to 128 products in another order, through two blocks
pytestmark = [
    pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.kind),
    pytest.mark.filterwarnings("ignore"),
]


def lora(family: Family) -> dict[str, Any]:
    return {"target_modules": "all-linear", "r": 4, "lora_alpha": 6} | family.lora


@pytest.mark.slow
def test_merge(tmp_path: Path, family: Family) -> None:
    """The base quantized while loading or saved in 4 bits: both give PEFT's unmerged logits."""
    made = pico.model(family.kind, **family.changes)
    base = pico.save(made, tmp_path / "base", torch.bfloat16)
    plain = pico.logits(made)
    live = pico.quantize(base, bnb_4bit_quant_type="nf4")
    live.save_pretrained(tmp_path / "packed")
    live = pico.live_4bit(live)
    pico.train(made, tmp_path / "adapter", **lora(family))
    live = peft.PeftModel.from_pretrained(live, tmp_path / "adapter").eval()
    expected = pico.logits(live)
    assert pico.relative(plain, expected) > 100 * FP32, "the adapter must matter"
    packed = sum(isinstance(m, Linear4bit) for m in live.modules())
    for source, simulate in (("base", Nf4Settings(quant_type="nf4", double_quant=False)), ("packed", None)):
        plan, _, tested = pico.merged(tmp_path / source, tmp_path / "adapter", tmp_path / "out", simulate=simulate)
        assert tested.worst <= 1
        assert sum(w.kind != "stored" for w in plan.base.weights.values()) == packed
        assert pico.relative(pico.logits(pico.reload(tmp_path / "out")), expected) < FP32, source


def seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """What the walk has after each block, filled in while it quantizes."""
    states: dict[int, Tensor] = {}
    block = Quantizer.block

    def recorded(self: Quantizer, index: int, items: list[BlockInput]) -> None:
        block(self, index, items)
        states[index] = torch.cat([item.hidden for item in items]).clone()

    monkeypatch.setattr(Quantizer, "block", recorded)
    return states


@torch.no_grad()
def block_outputs(made: Any, windows: Tensor) -> list[Tensor]:
    outputs: list[Tensor] = []

    def hook(_m: Any, _a: Any, out: Any) -> None:
        outputs.append((out[0] if isinstance(out, tuple) else out).clone())

    for block in block_list(made)[1]:
        block.register_forward_hook(hook)
    made(input_ids=windows)
    return outputs


def quantized(family: Family, tmp: Path, grid: Grid) -> tuple[Any, Any, Any]:
    """(plan, results, the written checkpoint as we read it, fp32)."""
    source = pico.save(pico.model(family.kind, **family.changes), tmp / "merged", torch.float16)
    (tmp / "gptq").mkdir()
    plan, results = quantize(
        source, tmp / "gptq", pico.ids(8, 32, seed=3), Settings(grid=grid, order="activation"), dtype=torch.float16,
        device=torch.device("cpu"), batch=4,
    )  # fmt: skip
    sources = variants.VariantSources.of_checkpoint(source, gptq=tmp / "gptq")
    return plan, results, variants.load("gptq", sources, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.slow
def test_quantize(tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The written file is the model that the walk ended in, and 8 bits keep the logits."""
    states = seen(monkeypatch)
    plan, results, ours = quantized(family, tmp_path, Grid(8, 32))
    assert {n.split(".", 3)[3] for n in plan.left} == set(family.left)
    assert {r.name for r in results} == set(plan.grids)
    assert not any(r.fallback for r in results)
    for index, output in enumerate(block_outputs(ours, pico.ids(8, 32, seed=3))):
        assert torch.allclose(states[index], output, rtol=1e-4, atol=1e-5), index
    expected = pico.logits(pico.reload(tmp_path / "merged"))
    worst = (pico.logits(ours) - expected).abs().amax(dim=-1) / expected.abs().max()
    assert float(worst.quantile(0.9)) < 0.03, "all but tokens whose router was undecided between experts"


@pytest.mark.slow
def test_load_back(tmp_path: Path, family: Family) -> None:
    """transformers with gptqmodel reads the 4-bit file as we mean it."""
    pytest.importorskip("gptqmodel")
    if "transformers" not in family.loads:
        pytest.skip("gptqmodel's own loader, or none: requant.targets says why")
    *_, ours = quantized(family, tmp_path, Grid(4, 32))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gptq", device_map={"": "cpu"}, dtype=torch.float32,
        quantization_config=transformers.GPTQConfig(bits=4, backend="gptq_torch"),
    ).eval()  # fmt: skip
    inside = block_list(loaded)[1]
    assert not any(type(m) is torch.nn.Linear for n, m in inside.named_modules() if not n.endswith(family.left))
    assert pico.relative(pico.logits(loaded), pico.logits(ours)) < FP32


@pytest.mark.slow
def test_load_back_by_gptqmodel(tmp_path: Path, family: Family) -> None:
    """gptqmodel's own loader, for what transformers cannot load; it computes in float16 only."""
    pytest.importorskip("gptqmodel")
    if family.loads != ("gptqmodel",):
        pytest.skip("transformers loads it, or neither does: requant.targets says why")
    *_, ours = quantized(family, tmp_path, Grid(4, 32))
    pico.save_tokenizer(tmp_path / "gptq")
    # A process of its own: the loader replaces classes and weight conversions of transformers for everybody.
    command = [sys.executable, "-m", "helpers.load_gptqmodel", str(tmp_path / "gptq"), str(tmp_path / "seen")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    seen = load_file(tmp_path / "seen")
    logits = seen.pop("logits")
    assert len(seen) == sum(name.endswith(".qweight") for name in Checkpoint(tmp_path / "gptq"))
    for name, weight in seen.items():
        # One rounding of scale * (code - zero) to float16: exact for the 8-bit mantissas of our scales.
        assert torch.equal(weight.float(), ours.get_submodule(name).weight.float()), name
    assert pico.relative(logits, pico.logits(ours)) < 5e-3

"""Program that writes tests/data/peft-VERSION: an older PEFT's adapters and their deltas.

The adapters are on stacked experts.

    pip download peft==0.18.1 --no-deps -d /tmp/old && unzip -q /tmp/old/peft-0.18.1-*.whl -d /tmp/old/0.18.1
    PYTHONPATH=/tmp/old/0.18.1:tests:pipeline:eval python tests/helpers/old_peft.py

The delta is what its merge adds to the stack in fp32, and its merge gives the logits of its unmerged forward.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import peft
import peft.tuners.lora
import torch
from safetensors.torch import save_file

from helpers import pico

DATA = Path(__file__).parents[1] / "data"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_local_experts": 3,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
}
KINDS: dict[str, dict[str, Any]] = {"mixtral": SIZES, "gpt_oss": SIZES | {"head_dim": 8}}
STACKS = ("gate_up_proj", "down_proj")
OWNER = "model.layers.0.mlp.experts"


def hide_quantization_libraries() -> None:
    """Hide quantization libraries from PEFT, which would call them by an older interface."""
    for found in pkgutil.iter_modules(peft.tuners.lora.__path__, "peft.tuners.lora."):
        module: Any = importlib.import_module(found.name)
        for name in vars(module).keys() & {
            "is_gptqmodel_available", "is_auto_awq_available", "is_torchao_available", "is_eetq_available", "is_hqq_available",
            "is_aqlm_available", "is_inc_available", "is_auto_gptq_available",
        }:  # fmt: skip
            setattr(module, name, lambda *_, **__: False)


def main() -> None:
    hide_quantization_libraries()
    for kind, sizes in KINDS.items():
        out = DATA / f"peft-{peft.__version__}-{kind}"
        made = pico.model(kind, **sizes)
        before = {leaf: made.get_parameter(f"{OWNER}.{leaf}").detach().clone() for leaf in STACKS}
        live = pico.train(
            made, out, r=2, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{s}" for s in STACKS]
        )
        unmerged = pico.logits(live)
        whole = live.merge_and_unload()
        assert pico.relative(pico.logits(whole), unmerged) < 1e-5
        deltas = {leaf: whole.get_parameter(f"{OWNER}.{leaf}").detach() - before[leaf] for leaf in STACKS}
        assert all(torch.count_nonzero(d) for d in deltas.values())
        save_file({k: d.contiguous() for k, d in deltas.items()}, out / "delta.safetensors")
        (out / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main()

"""Program: load a checkpoint with gptqmodel's own loader; write weights and logits.

python -m helpers.load_gptqmodel CHECKPOINT OUT.safetensors

Writes each quantized module's dequantized weight [out, in] by its name, and the logits of `pico.ids()`.
"""

from __future__ import annotations

import sys
from typing import Any

import gptqmodel
import torch
from safetensors.torch import save_file

from helpers import pico


def main(checkpoint: str, out: str) -> None:
    wrapped: Any = gptqmodel.GPTQModel.load(
        checkpoint, device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=torch.float16
    )
    model = wrapped.model.eval()
    seen = {name: m.dequantize_weight().T.contiguous() for name, m in model.named_modules() if hasattr(m, "qweight")}
    save_file(seen | {"logits": pico.logits(model).contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])

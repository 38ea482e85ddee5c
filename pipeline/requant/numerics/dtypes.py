"""DTYPES: the dtypes of unquantized weights by the names that recipes and config.json use."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
SIXTEEN_BIT = (torch.float16, torch.bfloat16)

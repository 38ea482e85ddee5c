"""Bases in FP8 and MXFP4 made of saved 16-bit ones, by encoders of the tests' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from requant.numerics import mxfp4

BLOCKS: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
ROWS: dict[str, Any] = {"quant_method": "fbgemm_fp8"}
TENSORS: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized"}


def fp8_codes(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(codes of E4M3, scales fp32 [rows / block, columns / block]) of one matrix."""
    rows, columns = weight.shape
    tiles = weight.float().reshape(rows // block[0], block[0], columns // block[1], block[1])
    scale = tiles.abs().amax((1, 3)) / 448
    return (tiles / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn), scale


def mxfp4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks, scales) of a stacked parameter [experts, in, out], rounded to nearest."""
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, mxfp4.BLOCK))
    exponent = (groups.abs().amax(-1) / 6).log2().ceil().clamp(-120, 120)
    scaled = groups / exponent.exp2()[..., None]
    codes = (scaled[..., None] - mxfp4.E2M1).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).to(torch.uint8)


def encode(base: Path, config: dict[str, Any], change: Callable[[str, Tensor], dict[str, Tensor] | None]) -> Path:
    """Rewrite a saved base: `change` gives what stands in a tensor's place, None leaves it."""
    file = base / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(file).items():
        new = change(name, value)
        tensors |= {name: value} if new is None else {n: t.contiguous() for n, t in new.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return base


def fp8(base: Path, config: dict[str, Any] = BLOCKS) -> Path:
    """Every projection in FP8, with scales as `config` stores them."""

    def change(name: str, value: Tensor) -> dict[str, Tensor] | None:
        if value.ndim != 2 or "proj" not in name:
            return None
        block = {"fp8": (32, 32), "fbgemm_fp8": (1, value.shape[1])}.get(config["quant_method"], tuple(value.shape))
        codes, scale = fp8_codes(value, block)  # type: ignore[arg-type]
        if config["quant_method"] == "fp8":
            return {name: codes, f"{name}_scale_inv": scale}
        scale = scale if config["quant_method"] == "fbgemm_fp8" else scale.flatten()
        return {name: codes, f"{name}_scale": scale, f"{name.removesuffix('weight')}input_scale": torch.ones(1)}

    return encode(base, config, change)


def mxfp4_base(base: Path) -> Path:
    """The stacked experts of a gpt-oss in MXFP4, named as on the hub."""

    def change(name: str, value: Tensor) -> dict[str, Tensor] | None:
        if value.ndim != 3:
            return None
        blocks, scales = mxfp4_codes(value)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    skip = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return encode(base, {"quant_method": "mxfp4", "modules_to_not_convert": skip}, change)

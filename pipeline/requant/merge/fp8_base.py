"""Bases stored in 8-bit floats, with a scale a block, a row or a tensor.

Blocks are DeepSeek's and Qwen's, rows fbgemm's, rows and tensors compressed-tensors'. A weight `N` of 8-bit floats has
its scales in `N_scale_inv` (fine-grained) or `N_scale`. Scales of activations and of the KV cache are dropped: a 16-bit
model has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint.reader import Checkpoint, TensorInfo, read_tensor
from requant.errors import InputError
from requant.merge.encoded_weight import EncodedWeight, read_scales
from requant.numerics import fp8

NAME = "FP8"
_SCALES = ("_scale_inv", "_scale")
_OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".input_scale_ub", ".k_scale", ".v_scale", ".q_scale")
_OTHER = (".weight_packed", ".weight_zero_point", ".weight_global_scale", ".weight_shape", ".qweight")


def encoded(checkpoint: Checkpoint) -> tuple[list[EncodedWeight], frozenset[str]]:
    """Every weight of 8-bit floats in fp32; names of the scales of activations.

    Raises InputError for codes without scales, scales that do not fit them, rotated weights, or other formats.
    """
    other = next((n for n in checkpoint if n.endswith(_OTHER) or checkpoint[n].dtype == torch.int8), None)
    if other is not None:
        raise InputError(
            f"{checkpoint[other].file}: {other} is no weight of 8-bit floats: of {NAME} bases only those are decoded. "
            "Use the 16-bit model that it was made from"
        )
    settings = checkpoint.quantization
    if settings.get("transform_config"):
        raise InputError(
            f"{checkpoint.path / 'config.json'}: quantization_config has a transform_config: its weights are rotated, "
            "and a 16-bit model would not turn them back. Use the 16-bit model that it was made from"
        )
    block = _block(settings, checkpoint.path / "config.json")
    found = [_weight(checkpoint, info, block) for info in checkpoint.values() if info.dtype in fp8.DTYPES]
    if not found:
        raise InputError(
            f"{checkpoint.path / 'config.json'}: quantization_config says {NAME}, but no tensor is of 8-bit floats: "
            "the files do not belong together. Remove quantization_config if the weights are 16-bit"
        )
    return found, frozenset(n for n in checkpoint if n.endswith(_OF_ACTIVATIONS))


def _weight(checkpoint: Checkpoint, codes: TensorInfo, block: tuple[int, int] | None) -> EncodedWeight:
    scale = next((checkpoint[codes.name + s] for s in _SCALES if codes.name + s in checkpoint), None)
    if scale is None or len(codes.shape) < 2:
        raise InputError(f"{codes.file}: {codes.name} is {codes.dtype} without a scale: download the checkpoint again")
    if scale.dtype not in fp8.SCALE_DTYPES:
        raise InputError(f"{scale.file}: {scale.name} is {scale.dtype}, expected {_words(fp8.SCALE_DTYPES)}")
    try:
        own = fp8.block_of(codes.shape, scale.shape, block)
    except fp8.Fp8Error as error:
        raise InputError(f"{scale.file}: {codes.name}: {error}") from error
    return EncodedWeight(
        name=codes.name,
        shape=codes.shape,
        dtype=torch.float32,
        parts=(codes.name, scale.name),
        scales=scale,
        read=partial(_read, codes, scale, own),
    )


def _read(codes: TensorInfo, scale: TensorInfo, block: tuple[int, int]) -> Tensor:
    return fp8.decode(read_tensor(codes), read_scales(scale), block)


def _words(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _block(settings: Mapping[str, Any], file: Path) -> tuple[int, int] | None:
    """The size of the blocks that the quantization_config of `file` gives; None: it gives none."""
    found = settings.get("weight_block_size") or _of_groups(settings)
    if not found:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int and n > 0 for n in found):
        raise InputError(f"{file}: weight_block_size is {found!r}, expected two whole numbers")
    return found[0], found[1]


def _of_groups(config: Mapping[str, Any]) -> object:
    """`block_structure` of compressed-tensors' first group of weights."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("block_structure"):
            return weights["block_structure"]
    return None

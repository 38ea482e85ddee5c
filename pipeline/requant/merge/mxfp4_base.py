"""Bases whose stacked experts are stored in MXFP4, as gpt-oss is on the hub.

`experts.gate_up_proj` [experts, in, out] is stored as `..._blocks` uint8 [experts, out, in / 32, 16] and `..._scales`
uint8 [experts, out, in / 32]. Everything else is in 16 bit.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from requant.checkpoint.reader import Checkpoint, TensorInfo, read_tensor
from requant.errors import InputError
from requant.merge.encoded_weight import EncodedWeight, read_scales
from requant.numerics import mxfp4

NAME = "MXFP4"
_BLOCKS, _SCALES = "_blocks", "_scales"


def encoded(checkpoint: Checkpoint) -> tuple[list[EncodedWeight], frozenset[str]]:
    """The experts' weights, by the names of a 16-bit checkpoint; nothing else is dropped.

    Raises InputError for blocks without scales, the other way round, or of shapes that do not fit.
    """
    names = [n for n in checkpoint if n.endswith(_BLOCKS) and checkpoint[n].dtype == torch.uint8]
    whole = {n.removesuffix(_BLOCKS) for n in names}
    lonely = [n for n in checkpoint if n.endswith(_SCALES) and n.removesuffix(_SCALES) not in whole]
    lonely += [n for n in names if n.removesuffix(_BLOCKS) + _SCALES not in checkpoint]
    if lonely or not names:
        raise InputError(
            f"{checkpoint.path}: config.json says {NAME}, but "
            + (f"{lonely[0]} stands alone" if lonely else f"no tensor is named ...{_BLOCKS}")
            + ": the checkpoint is incomplete, download it again"
        )
    return [_weight(checkpoint, name.removesuffix(_BLOCKS)) for name in names], frozenset()


def _weight(checkpoint: Checkpoint, name: str) -> EncodedWeight:
    blocks, scales = checkpoint[name + _BLOCKS], checkpoint[name + _SCALES]
    fits = len(blocks.shape) == 4 and blocks.shape[-1] == mxfp4.BLOCK // 2 and blocks.shape[:-1] == scales.shape
    if not fits or scales.dtype != torch.uint8:
        raise InputError(
            f"{blocks.file}: {blocks.name} {list(blocks.shape)} and {scales.name} {scales.dtype} {list(scales.shape)}: "
            "expected [experts, out, groups, 16] and uint8 [experts, out, groups]: download the checkpoint again"
        )
    experts, rows, groups, _ = blocks.shape
    return EncodedWeight(
        name=name,
        shape=(experts, groups * mxfp4.BLOCK, rows),
        dtype=torch.bfloat16,
        parts=(blocks.name, scales.name),
        scales=scales,
        read=partial(_read, blocks, scales),
    )


def _read(blocks: TensorInfo, scales: TensorInfo) -> Tensor:
    """All experts, bfloat16 [experts, in, out], one after the other."""
    experts, rows, groups, _ = blocks.shape
    out = torch.empty(experts, groups * mxfp4.BLOCK, rows, dtype=torch.bfloat16)
    for i in range(experts):
        out[i] = mxfp4.decode(read_tensor(blocks.entry(i)), read_scales(scales.entry(i))).T
    return out

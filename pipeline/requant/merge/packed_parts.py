"""The tensors that describe a 4-bit weight of bitsandbytes: quant_state, scales and tables."""

from __future__ import annotations

import torch

from requant.checkpoint.reader import Checkpoint, TensorInfo, read_tensor
from requant.errors import InputError
from requant.numerics import nf4
from requant.numerics.dtypes import DTYPES

STATE = ".quant_state.bitsandbytes__"
AUXILIARY = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def read_state(stored: TensorInfo) -> nf4.QuantState:
    """The quant_state that a tensor holds as the bytes of a JSON text."""
    if stored.dtype != torch.uint8:
        raise InputError(
            f"{stored.file}: {stored.name} is {stored.dtype}, but a quant_state is text in uint8: the checkpoint is "
            "damaged: download it again"
        )
    try:
        return nf4.parse_state(bytes(read_tensor(stored).numpy()))
    except nf4.Nf4Error as error:
        raise InputError(f"{stored.file}: {stored.name}: {error}") from error


def check(checkpoint: Checkpoint, name: str, state: nf4.QuantState) -> None:
    """Raise InputError where the headers of a packed weight's parts do not agree with its quant_state."""
    nested = state.nested_offset is not None
    parts = {".absmax": (state.blocks,), ".quant_map": (16,)}
    if nested:
        second = -(-state.blocks // state.nested_blocksize)
        parts |= {".nested_absmax": (second,), ".nested_quant_map": (nf4.NESTED_TABLE,)}
    lost = sorted(s for s in parts if name + s not in checkpoint)
    if lost:
        raise InputError(
            f"{checkpoint.path}: {name} is 4-bit but {name}{lost[0]} is missing: the checkpoint is incomplete"
        )
    for suffix, shape in parts.items():
        part, code = checkpoint[name + suffix], nested and suffix == ".absmax"
        if part.shape != shape or not (part.dtype == torch.uint8 if code else part.dtype in DTYPES.values()):
            raise InputError(
                f"{part.file}: {part.name} is {part.dtype} {list(part.shape)}, but {name} with the shape "
                f"{list(state.shape)} in blocks of {state.blocksize}, as its quant_state says, needs "
                f"{'uint8' if code else 'float32'} {list(shape)}: the checkpoint is damaged: download it again"
            )
    packed, half = checkpoint[name], -(-state.numel // 2)
    item = packed.dtype.itemsize
    if packed.nbytes != -(-half // item) * item:
        raise InputError(
            f"{packed.file}: {name}: quant_state says shape {state.shape} in blocks of {state.blocksize}; found "
            f"{packed.nbytes} packed bytes, expected {half}"
        )

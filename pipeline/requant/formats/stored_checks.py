"""Checks that all layouts share: of headers, scales, and of the patterns in a config."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint.reader import TensorInfo
from requant.formats.quantized_format import Finding, Packing
from requant.runtime.guarded_process import matches_in_time

SCALES = (torch.float16, torch.bfloat16)
_NAME = "model.layers.10.mlp.experts.3.down_proj"


def header_fault(
    info: TensorInfo | None, shape: tuple[int, ...], dtype: torch.dtype, packing: Packing, *, scales: bool, meaning: str
) -> str | None:
    """What is wrong with the header of one stored tensor; None: nothing.

    shape, dtype: as the config says. scales: whether it holds scales, which may be in either 16-bit dtype. meaning:
    what a wrong shape means, for the message.
    """
    if info is None:
        return f"missing: expected {_name(dtype)} {list(shape)}"
    if info.shape != shape:
        said = f"{packing.bits} bits and group_size {packing.group_size}"
        return f"shape {list(info.shape)}, expected {list(shape)} for {said}{meaning}"
    if info.dtype != dtype and not (scales and info.dtype in SCALES):
        return f"dtype {_name(info.dtype)}, expected {_name(dtype)}"
    return None


def bad_scales(where: str, scales: Tensor, *, outputs_first: bool = False) -> Iterator[Finding]:
    """Scales [groups, out], or [out, groups], that are zero or not finite."""
    for what, bad in (("not finite", ~torch.isfinite(scales)), ("zero", scales == 0)):
        if bad.any():
            first = tuple(int(i) for i in bad.nonzero()[0])
            group, row = first[::-1] if outputs_first else first
            count = f"{int(bad.sum())} of {scales.numel()} scales are {what}"
            yield Finding(where, f"{count}, the first of group {group}, output {row}")


def shown(value: Any) -> str:
    """A value of a config in a message, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def why_no_pattern(pattern: str) -> str | None:
    """Why a regular expression of a config cannot be matched with names of modules; None: it can."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return "which is no regular expression"
    return None if matches_in_time(pattern, (_NAME,)) else "which takes too long on a module's name"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

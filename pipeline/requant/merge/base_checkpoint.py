"""A base's files as a 16-bit checkpoint: what is in MXFP4 or FP8 is decoded when read.

A new format is a file with the names of `encoded_weight.BaseFormat` and a line in `FORMATS`. bitsandbytes' 4 bits are
not here: what training did with them matters, see `base_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from requant.checkpoint.model_files import without_quantization
from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.merge import fp8_base, mxfp4_base
from requant.merge.encoded_weight import BaseFormat, read_scales

FORMATS: Mapping[str, BaseFormat] = {
    "mxfp4": cast(BaseFormat, mxfp4_base),
    "fp8": cast(BaseFormat, fp8_base),
    "fbgemm_fp8": cast(BaseFormat, fp8_base),
    "compressed-tensors": cast(BaseFormat, fp8_base),
}
"""quant_method in config.json -> how its weights are decoded."""
LIVE = ("mxfp4", "fp8")
"""Those that transformers decodes by itself when it loads a model."""


SCALES = 2**26
"""Bytes of scales that are looked at before the work: all of most FP8 bases, of MXFP4 those of the first layers."""


class DecodedCheckpoint(Checkpoint):
    """A base whose encoded weights appear by their names, shapes and dtypes in a 16-bit checkpoint.

    method: `quant_method` of its config.json. encoded: name -> weight. auxiliary: names of the scales, which a
    16-bit checkpoint has not.
    """

    def __init__(self, stored: Checkpoint, method: str) -> None:
        self.path, self.method = stored.path, method
        weights, others = FORMATS[method].encoded(stored)
        twice = next((w for w in weights if w.name in stored and w.name not in w.parts), None)
        if twice is not None:
            raise InputError(
                f"{stored[twice.name].file}: {twice.name} is stored in 16 bit beside {twice.parts[0]}: which of them "
                "is the weight is not said. Download the checkpoint again"
            )
        self.encoded = {w.name: w for w in weights}
        first = {w.parts[0]: w.name for w in weights}
        dropped = {part for w in weights for part in w.parts} | others
        self.auxiliary = frozenset(dropped - first.keys())
        self._infos = {}
        for name, info in stored.items():
            if name in first:
                weight = self.encoded[first[name]]
                size = prod(weight.shape) * weight.dtype.itemsize
                info = replace(info, name=weight.name, dtype=weight.dtype, shape=weight.shape, nbytes=size)
                self._infos[weight.name] = info
            elif name not in dropped:
                self._infos[name] = info

    @property
    def format_name(self) -> str:
        """The format in words: MXFP4, FP8."""
        return FORMATS[self.method].NAME

    @property
    def config(self) -> dict[str, Any]:
        """config.json as raw JSON, without its `quantization_config`."""
        return without_quantization(super().config)

    def check_scales(self) -> None:
        """Raise InputError for NaN or infinity among the first `SCALES` bytes of scales; reading meets the others."""
        left = SCALES
        for weight in self.encoded.values():
            left -= weight.scales.nbytes
            if left < 0:
                return
            read_scales(weight.scales)

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the CPU, decoded."""
        return self.encoded[name].read() if name in self.encoded else super().read(name)

    def contiguous(self, name: str) -> bool:
        return name not in self.encoded and super().contiguous(name)


def open_base_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of a base, decoded where config.json names one of `FORMATS`.

    Raises InputError for a quantized base in a format that is neither of these nor bitsandbytes'.
    """
    checkpoint = Checkpoint(path)
    method = checkpoint.quantization.get("quant_method", "bitsandbytes")
    if isinstance(method, str) and method in FORMATS:
        return DecodedCheckpoint(checkpoint, method)
    if method != "bitsandbytes":
        raise InputError(
            f"{path / 'config.json'}: the base is quantized with {method!s:.80}; adapters are merged onto 16-bit "
            "bases, and onto those in bitsandbytes 4 bit, MXFP4 or FP8. Use the 16-bit model that it was made from"
        )
    return checkpoint

"""FORMATS: every quantized layout by its name. A new one is a file and an entry here."""

from __future__ import annotations

from pathlib import Path

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.formats import gptq
from requant.formats.gptq_reader import GptqReader
from requant.formats.quantized_format import QuantizedFormat, Reader

FORMATS: dict[str, QuantizedFormat] = {
    "gptq": QuantizedFormat(
        suffixes=gptq.SUFFIXES,
        shapes=gptq.shapes,
        pack=gptq.pack,
        unpack=gptq.unpack,
        dequantize=gptq.dequantize,
        config=gptq.quantization_config,
        recognise=gptq.recognise,
        reader=GptqReader,
    ),
}


def open_quantized(path: Path) -> Reader:
    """The reader of a written checkpoint, by the format that its config.json describes.

    Raises InputError when that is none of `FORMATS`.
    """
    config = Checkpoint(path).config.get("quantization_config") or {}
    for layout in FORMATS.values():
        if layout.recognise(config):
            return layout.reader(path)
    known, found = " or ".join(map(repr, FORMATS)), config.get("quant_method")
    raise InputError(f"{path / 'config.json'}: quantization_config.quant_method is {found!r}, expected {known}")

"""FORMATS: every quantized layout by its name. A new one is a file and an entry here."""

from __future__ import annotations

from requant.formats import gptq
from requant.formats.gptq_reader import GptqReader
from requant.formats.quantized_format import QuantizedFormat

FORMATS = {
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

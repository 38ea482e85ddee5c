"""FORMATS: every quantized layout that is written, by its name: a file and an entry here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.formats import (
    auto_round,
    auto_round_checks,
    awq,
    awq_checks,
    compressed_tensors,
    compressed_tensors_checks,
    gptq,
    gptq_checks,
    mlx,
    mlx_checks,
)
from requant.formats.auto_round_reader import AutoRoundReader
from requant.formats.awq_reader import AwqReader
from requant.formats.compressed_tensors_reader import CompressedTensorsReader
from requant.formats.gptq_reader import GptqReader
from requant.formats.mlx_reader import MlxReader
from requant.formats.quantized_format import QuantizedFormat, Reader, StoredFormat

GPTQ = QuantizedFormat(
    name="gptq",
    suffixes=gptq.SUFFIXES,
    codes=gptq.CODES,
    shapes=gptq.shapes,
    pack=gptq.pack,
    pack_stream=gptq.pack_stream,
    unpack=gptq.unpack,
    dequantize=gptq.dequantize,
    config=gptq.quantization_config,
    config_file=gptq.CONFIG_FILE,
    recognise=gptq.recognise,
    rules=gptq.GptqRules,
    reader=GptqReader,
    checks=gptq_checks.GptqChecks(),
    head=True,
)
COMPRESSED_TENSORS = QuantizedFormat(
    name="compressed-tensors",
    suffixes=compressed_tensors.SUFFIXES,
    codes=compressed_tensors.CODES,
    shapes=compressed_tensors.shapes,
    pack=compressed_tensors.pack,
    pack_stream=compressed_tensors.pack_stream,
    unpack=compressed_tensors.unpack,
    dequantize=compressed_tensors.dequantize,
    config=compressed_tensors.quantization_config,
    config_file=None,
    ends=True,
    recognise=compressed_tensors.recognise,
    rules=compressed_tensors.CompressedTensorsRules,
    reader=CompressedTensorsReader,
    checks=compressed_tensors_checks.CompressedTensorsChecks(),
    by_class=True,
)
_AUTO_ROUND = QuantizedFormat(
    name="auto-round",
    suffixes=auto_round.SUFFIXES,
    codes=auto_round.CODES,
    shapes=auto_round.shapes,
    pack=auto_round.pack,
    pack_stream=auto_round.pack_stream,
    unpack=auto_round.unpack,
    dequantize=auto_round.dequantize,
    config=auto_round.quantization_config,
    config_file=None,
    recognise=auto_round.recognise,
    rules=auto_round.AutoRoundRules,
    reader=AutoRoundReader,
    checks=auto_round_checks.AutoRoundChecks(),
    by_class=True,
    head=True,
)
AUTO_ROUND = replace(
    _AUTO_ROUND,
    with_zeros=replace(
        _AUTO_ROUND,
        pack=auto_round.pack_with_zeros,
        pack_stream=auto_round.pack_stream_with_zeros,
        unpack=partial(auto_round.unpack, minus_one=False),
        dequantize=partial(auto_round.dequantize, minus_one=False),
    ),
)
MLX = QuantizedFormat(
    name="mlx",
    suffixes=mlx.SUFFIXES,
    codes=mlx.CODES,
    shapes=mlx.shapes,
    pack=mlx.pack,
    pack_stream=mlx.pack_stream,
    unpack=mlx.unpack,
    dequantize=mlx.dequantize,
    config=mlx.quantization_config,
    config_file=None,
    config_keys=mlx.CONFIG_KEYS,
    zero_rounding=mlx.ROUNDING,
    beside=mlx.rotary_settings,
    ends=True,
    tied_ends=True,
    recognise=mlx.recognise,
    rules=mlx.MlxRules,
    reader=MlxReader,
    checks=mlx_checks.MlxChecks(),
)
AWQ = StoredFormat(
    name="awq",
    suffixes=awq.SUFFIXES,
    codes=awq.CODES,
    shapes=awq.shapes,
    recognise=awq.recognise,
    rules=awq.AwqRules,
    reader=AwqReader,
    checks=awq_checks.AwqChecks(),
)
FORMATS: dict[str, QuantizedFormat] = {layout.name: layout for layout in (GPTQ, COMPRESSED_TENSORS, AUTO_ROUND, MLX)}
READ_ONLY: dict[str, StoredFormat] = {AWQ.name: AWQ}


def recognised(config: Mapping[str, Any]) -> StoredFormat | None:
    """The layout that a `quantization_config` describes; None when it is none that is read."""
    every: list[StoredFormat] = [*FORMATS.values(), *READ_ONLY.values()]
    return next((layout for layout in every if layout.recognise(config)), None)


def not_recognised(config: Mapping[str, Any]) -> str:
    """What a `quantization_config` of no known layout says, and what was expected."""
    return f"quant_method is {config.get('quant_method')!r}, expected one of {', '.join([*FORMATS, *READ_ONLY])}"


def open_quantized(path: Path) -> Reader:
    """The reader of a written checkpoint, by the format that its config.json describes.

    Raises InputError when that is none that is read, or has settings that cannot be meant.
    """
    checkpoint = Checkpoint(path)
    config = checkpoint.quantization
    layout = recognised(config)
    if layout is None:
        raise InputError(f"{path / 'config.json'}: quantization_config.{not_recognised(config)}")
    faults = [reason for reason, _ in layout.checks.config(config)]
    if faults:
        raise InputError(f"{path / 'config.json'}: quantization_config: {faults[0]}: write the checkpoint again")
    return layout.reader(checkpoint)


def load_quantized(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a written checkpoint, quantized linears as fp32 `.weight`, one at a time."""
    reader = open_quantized(path)
    for name in reader:
        yield name, reader.read(name)


def unquantized_names(stored: Iterable[str], layout: StoredFormat) -> list[str]:
    """Tensor names of a quantized checkpoint with `weight` in place of the codes."""
    codes = f".{layout.codes}"
    return [f"{n.removesuffix(codes)}.weight" if n.endswith(codes) else n for n in stored]

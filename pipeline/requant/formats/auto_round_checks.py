"""Checks of an AutoRound checkpoint of packed integers: config, headers, scales, zeros."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from requant.checkpoint.reader import TensorInfo
from requant.formats.auto_round import AS_THEY_ARE, IN_16_BIT, MINUS_ONE, is_pattern, keeps_zero_points, shapes
from requant.formats.auto_round_reader import AutoRoundReader
from requant.formats.bit_stream import unpack_rows
from requant.formats.gptq_checks import SETTINGS
from requant.formats.quantized_format import Finding, Packing, Reader
from requant.formats.stored_checks import bad_scales, header_fault, shown, why_no_pattern

PACKINGS = (MINUS_ONE, "auto_round:gptq", AS_THEY_ARE)
_SETTINGS = {key: SETTINGS[key] for key in ("bits", "group_size", "sym")}
_ABSENT = {"super_bits": "scales that are quantized", "rotation_config": "rotated weights", "desc_act": "act order"}


class AutoRoundChecks:
    """`quantized_format.Checks` of AutoRound."""

    def config(self, declared: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
        """Faults of a `quantization_config`; none of its tensors can be checked in spite of one."""
        if declared.get("packing_format", MINUS_ONE) not in PACKINGS:
            yield f"packing_format is {shown(declared['packing_format'])}, expected {' or '.join(PACKINGS)}", False
        if declared.get("data_type", "int") != "int":
            yield f"data_type is {shown(declared['data_type'])}, expected 'int'", False
        activations = declared.get("act_bits") or IN_16_BIT
        if type(activations) is not int or activations < IN_16_BIT:
            yield f"act_bits is {shown(activations)}, expected 16: only weights are quantized here", False
        for key, meaning in _ABSENT.items():
            if declared.get(key):
                yield f"{key} is {shown(declared[key])}: {meaning} are not read", False
        for key, (expected, fits) in _SETTINGS.items():
            if not fits(declared.get(key)):
                yield f"{key} is {shown(declared.get(key))}, expected {expected}", False
        yield from ((fault, False) for fault in _names(declared))
        yield from ((fault, False) for fault in _extra(declared.get("extra_config") or {}))

    def header(self, suffix: str, info: TensorInfo | None, packing: Packing) -> str | None:
        """What is wrong with the header of one stored tensor. Raises PackError when the config cannot be meant."""
        shape, dtype = shapes(packing.rows, packing.columns, packing.bits, packing.group_size)[suffix]
        return header_fault(info, shape, dtype, packing, scales=suffix == "scales", meaning="")

    def values(self, stem: str, tensors: Mapping[str, Tensor], packing: Packing, reader: Reader) -> Iterator[Finding]:
        """What is wrong with one linear's scales and zero points."""
        assert isinstance(reader, AutoRoundReader)
        yield from bad_scales(f"{stem}.scales", tensors["scales"])
        if packing.symmetric:
            yield from _middles(stem, tensors["qzeros"], packing.bits, minus_one=reader.minus_one)
        elif reader.minus_one:
            yield from _unclear(stem, tensors["qzeros"], packing.bits)

    def files(self, path: Path, declared: Mapping[str, Any]) -> Iterator[Finding]:
        """Nothing: AutoRound's second copy of the config is read by no engine."""
        yield from ()

    def zero_points(self, declared: Mapping[str, Any]) -> tuple[str, str]:
        """Suffix of the zero points, and what is wrong when they are not stored as the config says."""
        ways = ("as they are", "minus one") if keeps_zero_points(declared) else ("minus one", "as they are")
        name = declared.get("packing_format", MINUS_ONE)
        return "qzeros", f"zero points are stored {ways[1]}, packing_format {name!r} means {ways[0]}"


def _middles(stem: str, qzeros: Tensor, bits: int, *, minus_one: bool) -> Iterator[Finding]:
    """A symmetric linear stores one zero point: the middle, or one less."""
    stored, expected = unpack_rows(qzeros.T.contiguous(), bits), 2 ** (bits - 1) - minus_one
    if not bool((stored == expected).all()):
        wrong = int(stored[stored != expected][0])
        reason = f"stores zero point {wrong}, a symmetric {bits}-bit linear stores {expected} everywhere"
        yield Finding(f"{stem}.qzeros", reason)


def _unclear(stem: str, qzeros: Tensor, bits: int) -> Iterator[Finding]:
    """A zero point that readers take for two."""
    most = 2**bits - 1
    if bool((unpack_rows(qzeros.T.contiguous(), bits) == most).any()):
        yield Finding(f"{stem}.qzeros", f"stores zero point {most}, which is {most + 1} to AutoRound and 0 to others")


def _names(declared: Mapping[str, Any]) -> Iterator[str]:
    """Faults of the lists of blocks."""
    for key in ("block_name_to_quantize", "to_quant_block_names"):
        names = declared.get(key)
        items = names if isinstance(names, list) else [names or ""]
        flat = [name for item in items for name in (item if isinstance(item, list) else [item])]
        if not all(isinstance(name, str) for name in flat):
            yield f"{key} is {shown(names)}, expected names of blocks"


def _extra(extra: Any) -> Iterator[str]:
    """Faults of the settings of single modules."""
    if not isinstance(extra, dict):
        yield f"extra_config is {shown(extra)}, expected pairs of module and settings"
        return
    for name, own in extra.items():
        if is_pattern(name) and (why := why_no_pattern(name)):
            yield f"extra_config has {shown(name)}, {why}"
        elif not isinstance(own, dict):
            yield f"extra_config of {shown(name)} is {shown(own)}, expected settings"
        elif type(own.get("bits")) is int and own["bits"] >= IN_16_BIT:
            continue  # what else is said of such a module, data_type float say, is of its 16 bit
        elif own.get("data_type", "int") != "int":
            yield f"extra_config of {shown(name)}: data_type is {shown(own['data_type'])}, expected 'int'"
        else:
            for key, (expected, fits) in _SETTINGS.items():
                if key in own and not fits(own[key]):
                    yield f"extra_config of {shown(name)}: {key} is {shown(own[key])}, expected {expected}"

"""Checks of a checkpoint of MLX's affine quantization: config, headers, scales, biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint.reader import TensorInfo, read_json
from requant.formats.bit_stream import BITS
from requant.formats.mlx import CONFIG_KEYS, GROUPS, MODE, shapes
from requant.formats.quantized_format import Finding, Packing, Reader
from requant.formats.stored_checks import bad_scales, header_fault, shown


class MlxChecks:
    """`quantized_format.Checks` of MLX."""

    def config(self, declared: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
        """Faults of a `quantization_config`; none of its tensors can be checked in spite of one."""
        yield from ((fault, False) for fault in _settings(declared))
        for name, own in declared.items():
            if name in ("bits", "group_size", "mode") or own is False or own is True:
                continue
            if not isinstance(own, dict):
                yield f"{shown(name)} is {shown(own)}, expected settings, or false for 16 bit", False
            else:
                yield from ((f"{shown(name)}: {fault}", False) for fault in _settings({**_usual(declared), **own}))

    def header(self, suffix: str, info: TensorInfo | None, packing: Packing) -> str | None:
        """What is wrong with the header of one stored tensor. Raises PackError when the config cannot be meant."""
        shape, dtype = shapes(packing.rows, packing.columns, packing.bits, packing.group_size)[suffix]
        return header_fault(info, shape, dtype, packing, scales=suffix != "weight", meaning="")

    def values(self, stem: str, tensors: Mapping[str, Tensor], packing: Packing, reader: Reader) -> Iterator[Finding]:
        """What is wrong with one linear's scales and biases."""
        yield from bad_scales(f"{stem}.scales", tensors["scales"], outputs_first=True)
        lost = int((~torch.isfinite(tensors["biases"])).sum())
        if lost:
            yield Finding(f"{stem}.biases", f"{lost} of {tensors['biases'].numel()} biases are not finite")

    def files(self, path: Path, declared: Mapping[str, Any]) -> Iterator[Finding]:
        """Two configs that differ: MLX goes by one of them, and transformers and hubs by the other."""
        config = read_json(path / "config.json", constants=True)
        if any(config.get(key) != declared for key in CONFIG_KEYS):
            yield Finding(f"config.json: {CONFIG_KEYS[0]}", f"is not what {CONFIG_KEYS[1]} says: MLX goes by the first")

    def zero_points(self, declared: Mapping[str, Any]) -> tuple[str, str]:
        """Suffix of the zero points, and what is wrong when they are not stored as the config says."""
        return "biases", "biases are those of zero points that are one off"


def _usual(declared: Mapping[str, Any]) -> dict[str, Any]:
    return {key: declared.get(key) for key in ("bits", "group_size", "mode")}


def _settings(values: Mapping[str, Any]) -> Iterator[str]:
    """Faults of bits, group size and mode."""
    if type(values.get("bits")) is not int or values["bits"] not in BITS:
        yield f"bits is {shown(values.get('bits'))}, expected one of {', '.join(map(str, BITS))}"
    if type(values.get("group_size")) is not int or values["group_size"] not in GROUPS:
        yield f"group_size is {shown(values.get('group_size'))}, expected one of {', '.join(map(str, GROUPS))}"
    if (values.get("mode") or MODE) != MODE:
        yield f"mode is {shown(values['mode'])}, expected {MODE!r}"

"""Checks of an AWQ checkpoint of AutoAWQ's GEMM packing: config, headers, scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from requant.checkpoint.reader import TensorInfo
from requant.formats.awq import BITS, settings, shapes
from requant.formats.gptq_checks import SETTINGS
from requant.formats.quantized_format import Finding, Packing, Reader
from requant.formats.stored_checks import bad_scales, header_fault, shown

_ABSENT = {"lm_head": "a quantized head is", "dynamic": "settings of single modules are", "desc_act": "act order is"}


class AwqChecks:
    """`quantized_format.Checks` of AWQ."""

    def config(self, declared: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
        """Faults of a `quantization_config`; none of its tensors can be checked in spite of one."""
        for key in ("version", "format", "checkpoint_format"):
            if str(declared.get(key) or "gemm").lower() != "gemm":
                yield f"{key} is {shown(declared[key])}, expected 'gemm': other packings are not read", False
        found, (size, fits) = settings(declared), SETTINGS["group_size"]
        if type(found["bits"]) is not int or found["bits"] != BITS:
            yield f"bits is {shown(found['bits'])}, expected {BITS}", False
        if not fits(found["group_size"]):
            yield f"group_size is {shown(found['group_size'])}, expected {size}", False
        if declared.get("zero_point", True) is not True:
            yield f"zero_point is {shown(declared['zero_point'])}, expected true: without them it is not read", False
        for key, meaning in _ABSENT.items():
            if declared.get(key):
                yield f"{key} is {shown(declared[key])}: {meaning} not read", False
        left = declared.get("modules_to_not_convert")
        if left is not None and not (isinstance(left, list) and all(isinstance(name, str) for name in left)):
            yield f"modules_to_not_convert is {shown(left)}, expected a list of names", False

    def header(self, suffix: str, info: TensorInfo | None, packing: Packing) -> str | None:
        """What is wrong with the header of one stored tensor. Raises PackError when the config cannot be meant."""
        shape, dtype = shapes(packing.rows, packing.columns, packing.bits, packing.group_size)[suffix]
        return header_fault(info, shape, dtype, packing, scales=suffix == "scales", meaning="")

    def values(self, stem: str, tensors: Mapping[str, Tensor], packing: Packing, reader: Reader) -> Iterator[Finding]:
        """What is wrong with one linear's scales."""
        yield from bad_scales(f"{stem}.scales", tensors["scales"])

    def files(self, path: Path, declared: Mapping[str, Any]) -> Iterator[Finding]:
        """Nothing: no other file repeats the config."""
        yield from ()

    def zero_points(self, declared: Mapping[str, Any]) -> tuple[str, str]:
        """Suffix of the zero points, and what is wrong when they are not stored as the config says."""
        return "qzeros", "zero points are stored minus one, as GPTQ stores them"

"""Checks of a compressed-tensors checkpoint of packed integers: config, headers, scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from requant.checkpoint.reader import TensorInfo
from requant.formats.bit_stream import BITS
from requant.formats.compressed_tensors import LAYOUT, REGEX, shapes
from requant.formats.quantized_format import Finding, Packing, Reader
from requant.formats.stored_checks import bad_scales, header_fault, shown, why_no_pattern

_ORDERS = ("group", "dynamic", True)  # of `actorder`, where inputs are grouped in an order of their own


class CompressedTensorsChecks:
    """`quantized_format.Checks` of compressed-tensors."""

    def config(self, declared: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
        """Faults of a `quantization_config`; none of its tensors can be checked in spite of one."""
        if declared.get("format") != LAYOUT:
            yield f"format is {shown(declared.get('format'))}, expected {LAYOUT!r}", False
        yield from ((fault, False) for fault in _targets("ignore", declared.get("ignore") or []))
        groups = declared.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            yield f"config_groups is {shown(groups)}, expected groups of modules with their settings", False
            return
        for name, group in groups.items():
            faults = _group(group) if isinstance(group, dict) else iter([f"is {shown(group)}, expected settings"])
            yield from ((f"config_groups.{name}: {fault}", False) for fault in faults)

    def header(self, suffix: str, info: TensorInfo | None, packing: Packing) -> str | None:
        """What is wrong with the header of one stored tensor. Raises PackError when the config cannot be meant."""
        shape, dtype = _shapes(packing)[suffix]
        return header_fault(info, shape, dtype, packing, scales=suffix == "weight_scale", meaning="")

    def values(self, stem: str, tensors: Mapping[str, Tensor], packing: Packing, reader: Reader) -> Iterator[Finding]:
        """What is wrong with one linear's scales, and with the stored shape, of which the bits follow."""
        stored, expected = tensors["weight_shape"].tolist(), [packing.rows, packing.columns]
        if stored != expected:
            yield Finding(f"{stem}.weight_shape", f"holds {stored}, but the model's weight is {expected}")
        yield from bad_scales(f"{stem}.weight_scale", tensors["weight_scale"], outputs_first=True)

    def files(self, path: Path, declared: Mapping[str, Any]) -> Iterator[Finding]:
        """Nothing: no other file repeats the config."""
        yield from ()

    def zero_points(self, declared: Mapping[str, Any]) -> tuple[str, str]:
        """Suffix of the zero points, and what is wrong when they are not stored as the config says."""
        return "weight_zero_point", "zero points are stored minus one, as GPTQ stores them"


def _shapes(packing: Packing) -> Mapping[str, Any]:
    return shapes(packing.rows, packing.columns, packing.bits, packing.group_size, symmetric=packing.symmetric)


def _group(group: Mapping[str, Any]) -> Iterator[str]:
    """Faults of one config group."""
    yield from _targets("targets", group.get("targets"))
    if group.get("format") not in (None, LAYOUT):
        yield f"format is {shown(group['format'])}, expected {LAYOUT!r}"
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            yield f"{key} is {shown(group[key])}, expected null: only weights are quantized here"
    weight = group.get("weights")
    if not isinstance(weight, dict):
        yield f"weights is {shown(weight)}, expected settings"
        return
    bits, size, strategy = (weight.get(key) for key in ("num_bits", "group_size", "strategy"))
    by_channel = strategy == "channel" and size in (None, -1)
    if type(bits) is not int or bits not in BITS:
        yield f"num_bits is {shown(bits)}, expected one of {', '.join(map(str, BITS))}"
    if weight.get("type") != "int":
        yield f"type is {shown(weight.get('type'))}, expected 'int'"
    if not isinstance(weight.get("symmetric"), bool):
        yield f"symmetric is {shown(weight.get('symmetric'))}, expected true or false"
    if not by_channel and not (strategy == "group" and type(size) is int and 1 <= size < 2**31):
        yield f"strategy is {shown(strategy)} with group_size {shown(size)}, expected 'group' with a size, or 'channel'"
    if weight.get("dynamic"):
        yield f"dynamic is {shown(weight['dynamic'])}, expected false"
    if weight.get("actorder") in _ORDERS:
        yield f"actorder is {shown(weight['actorder'])}: engines no longer read groups in an order of their own"


def _targets(key: str, targets: Any) -> Iterator[str]:
    """Faults of a list of names, classes and patterns."""
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        yield f"{key} is {shown(targets)}, expected a list of names"
        return
    for target in targets:
        if target.startswith(REGEX) and (why := why_no_pattern(target.removeprefix(REGEX))):
            yield f"{key} has {shown(target)}, {why}"

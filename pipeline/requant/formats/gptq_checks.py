"""Checks of a GPTQ checkpoint: config, headers, scales, zero points, group indices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint.reader import TensorInfo, read_json
from requant.formats.bit_stream import BITS, unpack_rows
from requant.formats.gptq import CONFIG_FILE, bits_of, is_v2, shapes
from requant.formats.gptq_reader import GptqReader
from requant.formats.quantized_format import Finding, Packing, Reader
from requant.formats.stored_checks import bad_scales, header_fault, shown, why_no_pattern

VERSIONS = ("gptq", "gptq_v2")


class GptqChecks:
    """`quantized_format.Checks` of GPTQ."""

    def config(self, declared: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
        """Faults of a `quantization_config`, and whether the tensors can be checked in spite of each."""
        for key, (expected, fits) in SETTINGS.items():
            if not fits(declared.get(key)):
                yield f"{key} is {shown(declared.get(key))}, expected {expected}", False
        yield from _rules(declared)
        version = declared.get("checkpoint_format", "gptq")
        if version not in VERSIONS:
            yield f"checkpoint_format is {shown(version)}, expected 'gptq' (or 'gptq_v2')", True

    def header(self, suffix: str, info: TensorInfo | None, packing: Packing) -> str | None:
        """What is wrong with the header of one stored tensor. Raises PackError when the config cannot be meant."""
        shape, dtype = shapes(packing.rows, packing.columns, packing.bits, packing.group_size)[suffix]
        also = "" if info is None or info.shape == shape else _meaning(suffix, info.shape, shape, packing)
        return header_fault(info, shape, dtype, packing, scales=suffix == "scales", meaning=also)

    def values(self, stem: str, tensors: Mapping[str, Tensor], packing: Packing, reader: Reader) -> Iterator[Finding]:
        """What is wrong with one linear's scales, zero points and group indices."""
        assert isinstance(reader, GptqReader)
        scales, g_idx = tensors["scales"], tensors["g_idx"].long()
        yield from bad_scales(f"{stem}.scales", scales)
        if packing.symmetric:
            yield from _symmetric_zeros(stem, tensors["qzeros"], packing.bits, v2=reader.v2)
        groups = scales.shape[0]
        size = packing.columns // groups
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            yield Finding(f"{stem}.g_idx", f"spans {int(g_idx.min())} to {int(g_idx.max())}, there are {groups} groups")
        elif not packing.desc_act and not torch.equal(g_idx, _groups_in_order(packing.columns, size, g_idx.device)):
            yield Finding(f"{stem}.g_idx", f"is not i // {size}, but desc_act is false: servers ignore it then")
        elif int(g_idx.bincount(minlength=groups).max()) > size:
            yield Finding(f"{stem}.g_idx", f"a group has more than {size} inputs")

    def files(self, path: Path, declared: Mapping[str, Any]) -> Iterator[Finding]:
        """Keys of quantize_config.json that differ from config.json."""
        beside = path / CONFIG_FILE
        if not beside.exists():
            return
        other = read_json(beside)
        for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic"):
            if key in other and (other[key] != declared.get(key) or type(other[key]) is not type(declared.get(key))):
                reason = f"{shown(other[key])}, config.json says {shown(declared.get(key))}"
                yield Finding(f"{CONFIG_FILE}: {key}", reason)

    def zero_points(self, declared: Mapping[str, Any]) -> tuple[str, str]:
        """Suffix of the zero points, and what is wrong when they are not stored as the config says."""
        version = VERSIONS[is_v2(declared)]
        return "qzeros", f"zero points of the other format version than checkpoint_format {version!r}"


SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bits": ("one of 2, 3, 4, 8", lambda v: type(v) is int and v in BITS),
    "group_size": ("-1 or a positive number", lambda v: type(v) is int and (v == -1 or 1 <= v < 2**31)),
    "sym": ("true or false", lambda v: isinstance(v, bool)),
    "desc_act": ("true or false", lambda v: isinstance(v, bool)),
}
"""Setting -> what is expected, whether a value is that."""


def _rules(declared: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Faults of what makes exceptions: `dynamic`, `modules_in_block_to_quantize`."""
    dynamic = declared.get("dynamic")
    if dynamic is not None and not isinstance(dynamic, dict):
        yield f"dynamic is {shown(dynamic)}, expected pairs of pattern and settings", False
        return
    for pattern, own in (dynamic or {}).items():
        if why := why_no_pattern(pattern.removeprefix("-:").removeprefix("+:")):
            yield f"dynamic has {shown(pattern)}, {why}", False
        elif not isinstance(own, dict):
            yield f"dynamic of {shown(pattern)} is {shown(own)}, expected settings", False
        else:
            for key, (expected, fits) in SETTINGS.items():
                if key in own and not fits(own[key]):
                    yield f"dynamic of {shown(pattern)}: {key} is {shown(own[key])}, expected {expected}", False
    inside = declared.get("modules_in_block_to_quantize")
    if inside is not None and not _lists_of_names(inside):
        yield f"modules_in_block_to_quantize is {shown(inside)}, expected lists of module names", False


def _lists_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(group, list) and all(isinstance(name, str) for name in group) for group in value
    )


def _groups_in_order(columns: int, size: int, device: torch.device) -> Tensor:
    """Group of each input when groups follow each other: i // size, int64 [columns]."""
    return torch.arange(columns, device=device) // size


def _symmetric_zeros(stem: str, qzeros: Tensor, bits: int, *, v2: bool) -> Iterator[Finding]:
    """A symmetric checkpoint stores one zero point: the middle, minus one in format v1."""
    stored = unpack_rows(qzeros.T.contiguous(), bits)
    expected = 2 ** (bits - 1) - (0 if v2 else 1)
    if bool((stored == expected).all()):
        return
    other = 2 ** (bits - 1) - (1 if v2 else 0)
    if bool((stored == other).all()):
        stored_as = "v1 (minus one)" if v2 else "v2 (as they are)"
        reason = (
            f"zero points are stored the {stored_as} way, checkpoint_format says {VERSIONS[v2]!r}: "
            "every weight is off by one step"
        )
    else:
        wrong = int(stored[stored != expected][0])
        reason = f"stores zero point {wrong}, a symmetric {bits}-bit checkpoint stores {expected} everywhere"
    yield Finding(f"{stem}.qzeros", reason)


def _meaning(suffix: str, have: tuple[int, ...], want: tuple[int, ...], packing: Packing) -> str:
    """What a wrong shape means, in the words of the config."""
    text = ""
    if len(have) != 2 or not packing.columns:
        return text
    if suffix == "qweight" and have[1] == want[1] and 32 * have[0] % packing.columns == 0:
        text += f"; the tensor is {bits_of(have, packing.columns)}-bit"
    if suffix in ("scales", "qzeros") and have[1] == want[1] and have[0] and packing.columns % have[0] == 0:
        text += f"; the tensor has groups of {packing.columns // have[0]}"
    return text

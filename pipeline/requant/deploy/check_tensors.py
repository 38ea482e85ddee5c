"""What the packed tensors of a checkpoint hold: scales, zero points, groups, and what they decode to.

One linear is in memory at a time. With the model that was quantized at hand, every weight is compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.deploy.check_headers import Finding, Structure
from requant.formats import gptq as gptq_format
from requant.formats.gptq import Packing

PART = 2**24  # numbers of an unquantized tensor looked at together
OTHER_WEIGHTS = 0.9
"""Relative error from which a decoded weight is not the source's. Rounding costs 0.05 to 0.2 at 4 bits and up to 0.7 at 2;
an unrelated weight of the same size is 1.4 away."""
SHIFT = 0.5
"""Mean distance in steps from the source's weights: the right zero point is near 0 away, the other convention exactly 1."""


@dataclass
class Values:
    """What was seen on the way. relative_error: largest of a decoded weight to its source, None without a source."""

    linears: int = 0
    weights: int = 0
    negative_scales: int = 0
    relative_error: float | None = None
    shifts: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def check(structure: Structure, source: Checkpoint | None = None, device: torch.device | None = None) -> Values:
    """Read and decode, on `device`, every linear whose headers are right, look at every other tensor for NaN and infinity."""
    seen, device = Values(), device or torch.device("cpu")
    packed = {f"{stem}.{suffix}" for stem in structure.packed for suffix in gptq_format.SUFFIXES}
    for stem, packing in structure.packed.items():
        tensors = {s: structure.checkpoint.read(f"{stem}.{s}").to(device) for s in gptq_format.SUFFIXES}
        wrong = list(_linear(stem, tensors, packing, structure.v2))
        seen.findings += wrong
        seen.linears += 1
        seen.weights += packing.rows * packing.columns
        seen.negative_scales += int((tensors["scales"] < 0).sum())
        if not wrong:
            _decoded(seen, stem, tensors, packing, structure, source)
    for name, info in structure.checkpoint.items():
        if name not in packed and info.dtype.is_floating_point:
            seen.findings += _plain(name, structure.checkpoint.read(name), source, device)
    seen.findings += _convention(seen, structure, source)
    return seen


def _linear(stem: str, tensors: dict[str, Tensor], packing: Packing, v2: bool) -> Iterator[Finding]:
    scales, g_idx = tensors["scales"], tensors["g_idx"].long()
    for what, bad in (("not finite", ~torch.isfinite(scales)), ("zero", scales == 0)):
        if bad.any():
            group, row = (int(i) for i in bad.nonzero()[0])
            count = f"{int(bad.sum())} of {scales.numel()} scales are {what}"
            yield Finding(f"{stem}.scales", f"{count}, the first of group {group}, output {row}")
    if packing.symmetric:
        yield from _middle(stem, tensors["qzeros"], packing.bits, v2)
    groups = scales.shape[0]
    size = packing.columns // groups
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        yield Finding(f"{stem}.g_idx", f"spans {int(g_idx.min())} to {int(g_idx.max())}, there are {groups} groups")
    elif not packing.desc_act and not torch.equal(g_idx, torch.arange(packing.columns, device=g_idx.device) // size):
        yield Finding(f"{stem}.g_idx", f"is not i // {size}, but desc_act is false: servers ignore it then")
    elif int(g_idx.bincount(minlength=groups).max()) > size:
        yield Finding(f"{stem}.g_idx", f"a group has more than {size} inputs")


def _middle(stem: str, qzeros: Tensor, bits: int, v2: bool) -> Iterator[Finding]:
    """A symmetric checkpoint stores one zero point: the middle, minus one in format v1."""
    stored = gptq_format.unpack_rows(qzeros.T.contiguous(), bits)
    expected = 2 ** (bits - 1) - (0 if v2 else 1)
    if bool((stored == expected).all()):
        return
    other = 2 ** (bits - 1) - (1 if v2 else 0)
    if bool((stored == other).all()):
        said, meant = ("gptq_v2", "v1 (minus one)") if v2 else ("gptq", "v2 (as they are)")
        reason = (
            f"zero points are stored the {meant} way, checkpoint_format says {said!r}: every weight is off by one step"
        )
    else:
        wrong = int(stored[stored != expected][0])
        reason = f"stores zero point {wrong}, a symmetric {bits}-bit checkpoint stores {expected} everywhere"
    yield Finding(f"{stem}.qzeros", reason)


def _decoded(
    seen: Values,
    stem: str,
    tensors: dict[str, Tensor],
    packing: Packing,
    structure: Structure,
    source: Checkpoint | None,
) -> None:
    """Compare with the source's weight; remember how far the steps lie off it (or off a mean of zero)."""
    codes, scale, zero, g_idx = gptq_format.unpack(tensors, packing.bits, v2=structure.v2)
    steps = codes.float() - zero[:, g_idx]
    name = f"{stem}.weight"
    if source is None or name not in source:
        if source is not None:
            seen.findings.append(Finding(name, "the source has no such weight"))
        seen.shifts[stem] = float(steps.mean())
        return
    wide = scale[:, g_idx]
    weight = source.read(name).to(steps.device).float()
    weight = weight.T if stem in structure.turned else weight
    if weight.shape != steps.shape:
        seen.findings.append(Finding(name, f"shape {list(steps.shape)}, the source's is {list(weight.shape)}"))
        return
    seen.shifts[stem] = float((steps - weight / wide).mean())
    error = float((steps * wide - weight).norm() / weight.norm().clamp(min=1e-30))
    seen.relative_error = max(seen.relative_error or 0.0, error)
    if error > OTHER_WEIGHTS:
        seen.findings.append(Finding(f"{stem}.qweight", f"decodes to other weights than the source's: {error:.0%} off"))


def _plain(name: str, tensor: Tensor, source: Checkpoint | None, device: torch.device) -> Iterator[Finding]:
    parts = torch.split(tensor.reshape(-1), PART)
    bad = sum(int((~torch.isfinite(part.to(device))).sum()) for part in parts)
    if bad:
        yield Finding(name, f"{bad} of {tensor.numel()} values are not finite")
    elif source is not None and name in source and source[name].shape == tuple(tensor.shape):
        error = _apart(parts, torch.split(source.read(name).reshape(-1), PART), device)
        if error > OTHER_WEIGHTS:
            yield Finding(name, f"is not the source's: {error:.0%} off")


def _apart(parts: Sequence[Tensor], before: Sequence[Tensor], device: torch.device) -> float:
    """Relative distance of a tensor from what it was, both in parts."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for new, old in zip(parts, before, strict=True):
        was = old.to(device).float()
        sums += torch.stack([(new.to(device).float() - was).square().sum(), was.square().sum()])
    difference, whole = sums.tolist()
    return math.sqrt(difference / max(whole, 1e-60))


def _convention(seen: Values, structure: Structure, source: Checkpoint | None) -> Iterator[Finding]:
    """Zero points of the other format version put every asymmetric weight one step off.

    With the source each linear shows it. Without, weights are taken to average to zero: over all linears the median says
    so, up to 4 bits; at 8 a step is too small against the spread of the weights.
    """
    packed = structure.packed
    loose = {
        stem: shift
        for stem, shift in seen.shifts.items()
        if not packed[stem].symmetric and (source is not None or packed[stem].bits <= 4)
    }
    if not loose:
        return
    said = "gptq_v2" if structure.v2 else "gptq"
    off = abs(median(loose.values()))
    if (off > SHIFT) if source is not None else (abs(off - 1) < SHIFT / 2):
        first = next(iter(loose))
        yield Finding(
            f"{first}.qzeros",
            f"weights lie {off:.2f} steps off (here and in {len(loose) - 1} more linears): "
            f"zero points of the other format version than checkpoint_format {said!r}",
        )

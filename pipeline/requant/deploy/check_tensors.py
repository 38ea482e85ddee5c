"""Value check of a quantized checkpoint: stored tensors and decoded weights.

One linear is in memory at a time. What was solved is compared exactly, by checksums. With a source, the model that was
quantized, every weight is compared with it: how far rounding may move it is known from the solution alone. At 2 bits,
or where a few loud inputs rule the Hessian, a right solution can be farther from its source than a foreign weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from requant.checkpoint.device_loader import load_onto
from requant.checkpoint.reader import Checkpoint
from requant.deploy.check_headers import HeaderCheck
from requant.errors import InputError
from requant.formats.quantized_format import Finding, Packing, StoredFormat
from requant.numerics.finite import count_not_finite
from requant.numerics.solution import checksum
from requant.quantize.module_results import ModuleRow

PART = 2**24  # values of an unquantized tensor that are checked at once
OTHER_WEIGHTS = 0.9
"""Relative error from which an unquantized tensor is not the source's; an unrelated one of its size is 1.4 away."""
SHARES = (0.5, 1.5)
"""Share <Q, W> / <W, W> of the source's weight W that a decoded weight Q may hold, where no solution is known.

1 when the errors are independent of W, whatever their size; 0 in an unrelated weight, and s in one of a scale s times
too large. At 2 bits 0.86 at a distance of 216 %, and 0.72 at 821 %, with too little damping."""
SAME_DISTANCE = 0.02, 0.05
"""Allowed difference of a distance from the solved one, and its share: a GPU solves for the source's 16-bit cast."""
SHIFT = 0.5
"""Mean distance in steps from the source's weights: near 0 with the right zero point, 1 with the other convention."""


@dataclass(kw_only=True)
class TensorCheck:
    """Findings about the values, and what was counted.

    relative_error: the largest of a decoded weight to its source; None without a source.
    shifts: stem -> mean distance of its weights from the source's (without one: from zero), in steps.
    """

    linears: int = 0
    weights: int = 0
    negative_scales: int = 0
    relative_error: float | None = None
    shifts: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def check(
    headers: HeaderCheck,
    source: Checkpoint | None = None,
    device: torch.device | None = None,
    *,
    solved: Mapping[str, ModuleRow] | None = None,
) -> TensorCheck:
    """Decode every linear whose headers are right, on `device`.

    solved: stem -> result of the linear's solution, which the file must decode to. Search all other tensors for NaN
    and infinity.
    """
    return joined([check_share(headers, source, device, solved=solved)], headers, source)


def joined(shares: Iterable[TensorCheck], headers: HeaderCheck, source: Checkpoint | None) -> TensorCheck:
    """The check of a checkpoint from those of its shares; what only all linears together show is added."""
    whole = TensorCheck()
    for share in shares:
        whole.linears += share.linears
        whole.weights += share.weights
        whole.negative_scales += share.negative_scales
        if share.relative_error is not None:
            whole.relative_error = max(whole.relative_error or 0.0, share.relative_error)
        whole.shifts |= share.shifts
        whole.findings += share.findings
    whole.findings += _zero_point_version(whole, headers, source)
    return whole


def check_share(
    headers: HeaderCheck,
    source: Checkpoint | None = None,
    device: torch.device | None = None,
    *,
    solved: Mapping[str, ModuleRow] | None = None,
    rank: int = 0,
    count: int = 1,
) -> TensorCheck:
    """`check` of every count-th linear and tensor, beginning with number `rank`."""
    result, device = TensorCheck(), device or torch.device("cpu")
    if headers.layout is not None:
        own = dict(list(headers.packed.items())[rank::count])
        _quantized(result, headers, headers.layout, own, source, device, solved or {})
    packed = set(headers.packed_names)
    copies = {*headers.unplaced.state, *headers.unplaced.carried}
    for name, info in list(headers.checkpoint.items())[rank::count]:
        if name in copies and source is not None:
            result.findings += _copy(name, headers.checkpoint.read(name), source)
        elif name not in packed and info.dtype.is_floating_point:
            result.findings += _unquantized(name, load_onto(headers.checkpoint, name, device), source)
    return result


def _quantized(
    result: TensorCheck,
    headers: HeaderCheck,
    layout: StoredFormat,
    packed: Mapping[str, Packing],
    source: Checkpoint | None,
    device: torch.device,
    solved: Mapping[str, ModuleRow],
) -> None:
    """Check and decode the linears `packed`: stem -> how it is stored."""
    reader = layout.reader(headers.checkpoint)
    for stem, packing in packed.items():
        try:
            tensors = reader.tensors(f"{stem}.weight", device)
        except InputError as error:  # what is stored beside the codes contradicts their headers
            reason = str(error).removeprefix(f"{headers.checkpoint.path}: ")
            result.findings.append(Finding(f"{stem}.{layout.codes}", reason))
            continue
        decoded = reader.decode(tensors)
        wrong = list(layout.checks.values(stem, tensors, packing, reader))
        result.findings += wrong
        result.linears += 1
        result.weights += packing.rows * packing.columns
        result.negative_scales += int((decoded[1] < 0).sum())
        if not wrong:
            solution = solved.get(stem, {})
            expected = solution.get("checksum")
            if expected is not None and int(checksum(*decoded[:3])) != expected:
                result.findings.append(Finding(f"{stem}.{layout.codes}", "does not decode to what was solved"))
                continue
            _compare_decoded(result, stem, decoded, headers, layout, source, solution.get("distance"))


def _compare_decoded(
    result: TensorCheck,
    stem: str,
    decoded: tuple[Tensor, Tensor, Tensor, Tensor],
    headers: HeaderCheck,
    layout: StoredFormat,
    source: Checkpoint | None,
    distance: float | None,
) -> None:
    """Compare one linear with its source's weight; record the shift in steps.

    distance: of the solution from its source. decoded: codes [out, in], scale and zero [out, groups], group of each
    input [in].
    """
    codes, scale, zero, g_idx = decoded
    steps = codes.float() - zero[:, g_idx]
    name = f"{stem}.weight"
    if source is None or name not in source:
        if source is not None:
            result.findings.append(Finding(name, "the source has no such weight"))
        result.shifts[stem] = float(steps.mean())
        return
    scales = scale[:, g_idx]
    weight = load_onto(source, name, steps.device).float()
    weight = weight.T if stem in headers.transposed else weight
    if weight.shape != steps.shape:
        result.findings.append(Finding(name, f"shape {list(steps.shape)}, the source's is {list(weight.shape)}"))
        return
    result.shifts[stem] = float((steps - weight / scales).mean())
    values = steps * scales
    error = float((values - weight).norm() / weight.norm().clamp(min=1e-30))
    result.relative_error = max(result.relative_error or 0.0, error)
    if (other := _other_weights(values, weight, error, distance)) is not None:
        result.findings.append(Finding(f"{stem}.{layout.codes}", other))


def _other_weights(values: Tensor, weight: Tensor, error: float, distance: float | None) -> str | None:
    """Why decoded values are not the source's weight, None where they are.

    error: their relative distance. distance: of the solution, where it is known.
    """
    if distance is not None:
        absolute, relative = SAME_DISTANCE
        if abs(error - distance) <= absolute + relative * distance:
            return None
        return f"decodes to other weights than the source's: {error:.0%} off, {distance:.0%} when it was solved"
    share = float((values * weight).sum() / weight.square().sum().clamp(min=1e-30))
    if SHARES[0] <= share <= SHARES[1] or not bool(weight.any()):
        return None
    return f"decodes to other weights than the source's: {error:.0%} off, and {share:.0%} of the source's is in them"


def _unquantized(name: str, tensor: Tensor, source: Checkpoint | None) -> Iterator[Finding]:
    parts = torch.split(tensor.reshape(-1), PART)
    bad = sum(map(count_not_finite, parts))
    if bad:
        yield Finding(name, f"{bad} of {tensor.numel()} values are not finite")
    elif source is not None and name in source and source[name].shape == tuple(tensor.shape):
        before = load_onto(source, name, tensor.device)
        error = _relative_distance(parts, torch.split(before.reshape(-1), PART))
        if error > OTHER_WEIGHTS:
            yield Finding(name, f"is not the source's: {error:.0%} off")


def _copy(name: str, tensor: Tensor, source: Checkpoint) -> Iterator[Finding]:
    """A finding unless the source holds the same values, cast to the stored dtype."""
    if name not in source:
        yield Finding(name, "the source has no such tensor, and the model class has no place for it")
    elif source[name].shape != tuple(tensor.shape):
        yield Finding(name, f"shape {list(tensor.shape)}, the source's is {list(source[name].shape)}")
    elif not torch.equal(_bytes(source.read(name).to(tensor.dtype)), _bytes(tensor)):
        yield Finding(name, "is not the source's: it should be a copy")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _relative_distance(parts: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Relative distance of a tensor from what it was, both in parts."""
    sums = torch.zeros(2, dtype=torch.float64, device=parts[0].device)
    for new, old in zip(parts, before, strict=True):
        was = old.float()
        sums += torch.stack([(new.float() - was).square().sum(), was.square().sum()])
    difference, whole = sums.tolist()
    return math.sqrt(difference / max(whole, 1e-60))


def _zero_point_version(result: TensorCheck, headers: HeaderCheck, source: Checkpoint | None) -> Iterator[Finding]:
    """A finding when asymmetric zero points are of the other format version.

    Every weight is then one step off. With a source each linear shows the shift. Without one, weights are assumed to
    average to zero, and the median over all linears shows it up to 4 bits. At 8 bits a step is too small against the
    spread of the weights.
    """
    packed, layout = headers.packed, headers.layout
    asymmetric = {
        stem: shift
        for stem, shift in result.shifts.items()
        if not packed[stem].symmetric and (source is not None or packed[stem].bits <= 4)
    }
    if not asymmetric or layout is None:
        return
    off = abs(median(asymmetric.values()))
    if (off > SHIFT) if source is not None else (abs(off - 1) < SHIFT / 2):
        first = next(iter(asymmetric))
        where, reason = layout.checks.zero_points(headers.declared)
        yield Finding(
            f"{first}.{where}",
            f"weights lie {off:.2f} steps off (here and in {len(asymmetric) - 1} more linears): {reason}",
        )

"""Conversion of a quantized checkpoint into another layout.

Codes, scales and zero points stay the same; what cannot be said in the other layout is refused. Nothing is rounded but
MLX's biases of asymmetric linears, and by how much is told, and token embeddings and head where that is asked for. One
linear is in memory at a time. What was written is read back and compared with its source before it gets its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from requant import __version__
from requant.checkpoint.artifact import new_directory
from requant.checkpoint.atomic_write import copy_file, write_text
from requant.checkpoint.model_files import ANY_TEXT, VOCABULARY
from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.writer import CheckpointWriter
from requant.deploy import check_headers
from requant.deploy.check_headers import HeaderCheck
from requant.deploy.conversion_plan import AS_THEY_ARE, ConversionPlan, plan_conversion
from requant.deploy.end_codes import is_nearest, rounded_end
from requant.deploy.own_scores import tokenized
from requant.errors import InputError, StageError
from requant.formats.quantized_format import PackError, QuantizedFormat, Reader
from requant.formats.registry import FORMATS
from requant.formats.stored_reader import StoredReader
from requant.modeling import skeleton
from requant.modeling.token_ends import EndBits
from requant.quantize.gptq_files import write_small_files
from requant_eval.regular_files import read_bytes

Progress = Callable[[int, int, str], None]
Decode = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor, Tensor, Tensor]]
NOTE = (
    "> The files here are in the format {}. `requant convert` made them of the checkpoint that this card describes, "
    "whose codes, scales and zero points they hold. Commands below that load it are for that one."
)
FRONT_MATTER = re.compile(r"---\n.*?\n---\n+", re.DOTALL)
CARDS = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
_SHOWN = 5  # findings in a message


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was converted.

    dropped: stored tensors that say nothing, and why. nbytes: of all tensors, before and after. largest_rounding: of a
    weight, in steps of its scale. ends: embeddings and head that were rounded -> bits.
    """

    linears: int
    dropped: dict[str, str]
    nbytes: tuple[int, int]
    largest_rounding: float = 0.0
    ends: Mapping[str, int] = field(default_factory=dict)


@torch.no_grad()
def convert(
    source: Path, out: Path, to: str, *, ends: EndBits = AS_THEY_ARE, trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Conversion:  # fmt: skip
    """Write the quantized checkpoint in `source` as a new directory `out` in the layout `to`, one of `FORMATS`.

    ends: bits to which token embeddings and head, in 16 bit there, are rounded to nearest.

    Raises:
        InputError: `out` is there, `source` is wrong or in this layout already, or cannot be said in it.
        StageError: what was written does not decode to the same weights.
    """
    with new_directory(out) as partial:
        done = convert_into(
            partial / "out", source, to, ends=ends, trust_remote_code=trust_remote_code, progress=progress
        )
        copy_cards(source, partial / "out", to)
    return done


def convert_into(
    out: Path, source: Path, to: str, *, ends: EndBits = AS_THEY_ARE, trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Conversion:  # fmt: skip
    """`convert` into the existing directory `out`, which gets no name of its own; without the card."""
    headers = checked(source, to, ends=ends, trust_remote_code=trust_remote_code)
    planned = plan_conversion(headers, FORMATS[to], source, ends)
    steps = Steps(2 * len(planned.written), progress)
    _write(planned, out, steps)
    _write_files(planned, source, out)
    rounding = _compare(planned, out, steps, trust_remote_code=trust_remote_code)
    after = sum(slot.nbytes for slot in planned.plan.slots)
    return Conversion(
        linears=len(planned.plan.grids),
        ends={name: grid.bits for name, grid in planned.rounded.items()},
        dropped=dict(planned.dropped),
        nbytes=(stored_bytes(headers), after),
        largest_rounding=rounding,
    )


def stored_bytes(headers: HeaderCheck) -> int:
    """Bytes of all tensors of a checkpoint."""
    return sum(info.nbytes for info in headers.checkpoint.values())


class Steps:
    """Counts what is written and compared. A call is one step, and says which."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress, self.done = total, progress, 0

    def __call__(self, note: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, note)


def checked(source: Path, to: str, *, ends: EndBits, trust_remote_code: bool) -> HeaderCheck:
    """The headers of a checkpoint that may be converted; InputError where its config is not to be read.

    The groups of an act-order checkpoint are read too: they are small, and may be what `to` cannot say.
    ends: what is to be rounded: with it a checkpoint may keep its format.
    """
    if to not in (known := [*FORMATS, "gguf"]):
        raise InputError(f"{source}: cannot be converted to {to!r}: expected one of {', '.join(known)}")
    headers = check_headers.check_weights(source, trust_remote_code=trust_remote_code)
    if headers.layout is None or not headers.usable:
        raise InputError("\n".join([f"{source}: cannot be converted:", *map(str, headers.findings[:_SHOWN])]))
    if headers.layout.name == to and not ends:
        raise InputError(f"{source}: is a {to} checkpoint already: name another format")
    for stem, packing in headers.packed.items():
        if packing.desc_act and f"{stem}.g_idx" in headers.checkpoint:
            _refuse_own_order(headers.checkpoint, stem, packing.group_size, to)
    skeleton.check_generation_config(source)  # the small files are copied: what no engine loads is no checkpoint
    if any((source / name).exists() for name in VOCABULARY):
        tokenized(source, ANY_TEXT, trust_remote_code=trust_remote_code)
    return headers


def _refuse_own_order(checkpoint: Checkpoint, stem: str, size: int, to: str) -> None:
    """Raise InputError where the inputs of a linear are in groups of `size`, -1: all of them, that lie apart.

    Other faults of its g_idx are left to the check of its values, which says what they are.
    """
    group = checkpoint.read(f"{stem}.g_idx").long()
    expected = torch.arange(len(group)) // (len(group) if size == -1 else size)
    if torch.equal(group.sort().values, expected) and not torch.equal(group, expected):
        raise _own_order(checkpoint, stem, to)


def _own_order(checkpoint: Checkpoint, stem: str, target: str) -> InputError:
    """The error of a linear whose groups no layout but GPTQ can say."""
    return InputError(
        f"{checkpoint.path}: {stem} has its groups in an order of their own (desc_act), which {target} cannot say: "
        "quantize again without it"
    )


def _write(planned: ConversionPlan, out: Path, steps: Steps) -> None:
    """Write every tensor of the plan, one linear in memory at a time."""
    target = planned.plan.format
    with CheckpointWriter(out, planned.plan.slots) as writer:
        for module, weight in planned.written.items():
            for suffix, tensor in _repacked(planned, module, weight, target).items():
                writer.write(f"{weight.removesuffix('weight')}{suffix}", tensor)
            steps(f"writing {module}")
        for name in planned.copied:
            writer.write(name, planned.unquantized(name))
        writer.close()


def _repacked(planned: ConversionPlan, module: str, weight: str, target: QuantizedFormat) -> dict[str, Tensor]:
    """One linear's tensors in the target layout; InputError where they cannot say the same."""
    grid = planned.grid_of(module)
    if weight not in planned.reader.quantized:
        return target.pack(*rounded_end(planned, module), grid.bits, symmetric=grid.symmetric)
    decode, pack = planned.reader.decode, target.pack
    if isinstance(planned.reader, StoredReader) and target.pack_stream is not None:  # then no code is unpacked
        decode, pack = planned.reader.stream, target.pack_stream
    codes, scale, zero = in_order(planned, module, weight, target.name, decode)
    try:
        return pack(codes, scale, zero, grid.bits, symmetric=grid.symmetric)
    except PackError as error:
        raise cannot_be_stored(planned, module, target.name, error) from error


def in_order(
    planned: ConversionPlan, module: str, weight: str, target: str, decode: Decode
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as `decode` gives them, scale and zero fp32 [out, groups] of one linear, in groups of neighbours.

    target: name of the format to write. Raises InputError for values that are wrong, and groups in another order.
    """
    reader, stem = planned.reader, weight.removesuffix(".weight")
    tensors = reader.tensors(weight)
    for finding in planned.source.checks.values(stem, tensors, planned.packings[module], reader):
        raise InputError(f"{reader.checkpoint.path}: {finding}: `requant verify` shows all that is wrong")
    codes, scale, zero, group = decode(tensors)
    if not torch.equal(group, torch.arange(len(group)) // (len(group) // scale.shape[1])):
        raise _own_order(reader.checkpoint, stem, target)
    return codes, scale, zero


def cannot_be_stored(planned: ConversionPlan, module: str, target: str, why: PackError) -> InputError:
    """The error of a linear that a format does not hold."""
    return InputError(
        f"{planned.reader.checkpoint.path}: {module} cannot be stored as {target}: {why}: choose another format, or "
        "quantize again"
    )


def _write_files(planned: ConversionPlan, source: Path, out: Path) -> None:
    """Write configs, tokenizer and templates."""
    damp, meta = (planned.declared.get(key) for key in ("damp_percent", "meta"))  # no engine reads them
    write_small_files(
        source,
        out,
        planned.plan,
        planned.settings,
        dtype=planned.dtype,
        damp=damp if isinstance(damp, float) else 0.01,
        meta={**(meta if isinstance(meta, Mapping) else {}), "converter": [f"requant:{__version__}"]},
    )


def copy_cards(source: Path, out: Path, to: str) -> None:
    """Copy the model card and licences; the card says first that these files are in the format `to`."""
    for pattern in CARDS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                copy_file(file, out / file.name)
    card = out / "README.md"
    if card.is_file():
        text = read_bytes(card).decode(errors="replace")
        write_text(card, with_note(text, NOTE.format(to)))


def with_note(card: str, note: str) -> str:
    """A model card with a paragraph after its front matter."""
    front = FRONT_MATTER.match(card)
    end = front.end() if front else 0
    return f"{card[:end]}{note}\n\n{card[end:]}"


def _compare(planned: ConversionPlan, out: Path, steps: Steps, *, trust_remote_code: bool) -> float:
    """The largest change of a zero point, and so of a weight in steps of its scale; 0 but for formats that round it.

    Raises StageError unless what was written has right headers and decodes to what its source does.
    """
    headers = check_headers.check_weights(out, trust_remote_code=trust_remote_code)
    for finding in headers.findings:
        raise StageError(f"what was converted is wrong: {finding}")
    checkpoint = Checkpoint(out)
    reader = planned.plan.format.reader(checkpoint)
    if reader.quantized != frozenset(planned.written.values()):
        raise StageError("what was converted does not hold the linears of its source")
    largest, allowed = 0.0, planned.plan.format.zero_rounding
    for module, weight in planned.written.items():
        if weight not in planned.reader.quantized:
            rounding = 0.0 if _is_rounded(planned, reader, module, weight) else None
        else:
            rounding = _rounding(reader, planned.reader, weight, allowed)
        if rounding is None:
            raise StageError(f"{module}: what was converted does not decode to its source")
        largest = max(largest, rounding)
        steps(f"comparing {module}")
    for name in planned.copied:
        if not _is_copy(planned.reader.checkpoint, checkpoint, name):
            raise StageError(f"{name}: what was converted is no copy of its source")
    return largest


def _is_rounded(planned: ConversionPlan, reader: Reader, module: str, weight: str) -> bool:
    """Whether an end's codes are the nearest to its values."""
    return is_nearest(planned.reader.checkpoint.read(weight), *reader.unpack(weight)[:3], planned.grid_of(module))


def _is_copy(source: Checkpoint, out: Checkpoint, name: str) -> bool:
    """Whether a tensor is the same in both; neither is in memory afterwards."""
    old, new = source.read(name), out.read(name)
    return old.dtype == new.dtype and torch.equal(_bytes(old), _bytes(new))


def _rounding(one: Reader, other: Reader, weight: str, allowed: float) -> float | None:
    """The largest difference of a weight's zero points in both; None: they, or anything else, are not the same.

    allowed: how much of a zero point its difference may be.
    """
    if isinstance(one, StoredReader) and isinstance(other, StoredReader):
        parts = zip(one.stream(one.tensors(weight)), other.stream(other.tensors(weight)), strict=True)
    else:
        parts = zip(one.unpack(weight), other.unpack(weight), strict=True)
    codes, scales, (zero, expected), groups = parts
    difference = (zero - expected).abs()
    same = all(torch.equal(a, b) for a, b in (codes, scales, groups)) and bool((difference <= allowed * expected).all())
    return float(difference.max()) if same else None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)

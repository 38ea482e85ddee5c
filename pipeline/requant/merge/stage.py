"""Merge stage: fold the adapter into the base weights and write a 16-bit checkpoint.

    W = D + scaling * B @ A     all in fp32, one rounding, at the end

D is the decoded base. Training multiplied by D in its compute dtype, so D is rounded to that where the written file is
finer (`BaseWeight.folded_as_trained`).

The plan is made and checked from headers. Then one tensor at a time is in memory and is written to its final place.
Several ranks write a share of the tensors each, into the same files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from requant.checkpoint import model_files
from requant.checkpoint.atomic_write import make_directory
from requant.checkpoint.device_loader import load_tensor
from requant.checkpoint.writer import CheckpointWriter
from requant.errors import StageError
from requant.merge import refusals
from requant.merge.base_weights import CPU, BaseWeight
from requant.merge.plan import Ledger, MergePlan, Op, target_dtype
from requant.merge.stop_tokens import StopTokens
from requant.merge.stored_dtype import choose_dtype
from requant.numerics import matmul_precision
from requant.numerics.dtypes import DTYPES
from requant.numerics.finite import count_not_finite, largest_magnitude
from requant.runtime.ranks import SINGLE_PROCESS, Ranks

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
UNTRAINED = "{}: every LoRA delta is exactly zero: this adapter was never trained"


@dataclass(kw_only=True)
class MergeResult:
    """The outcome of a merge, for the report.

    why: the reason for `dtype`. onto: what the adapter was folded onto. ledger: counts of tensors by what was done.
    untrained: modules with a zero delta. max_abs: largest magnitude written. bytes: of all tensors. carried: module
    that only servers run -> its tensors. stop_tokens: what the fine-tune's tokenizer changed in them, in a sentence.
    """

    dtype: str
    why: str
    onto: str
    ledger: Ledger
    untrained: list[str] = field(default_factory=list)
    max_abs: float = 0.0
    bytes: int = 0
    carried: dict[str, int] = field(default_factory=dict)
    stop_tokens: str | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass
class Share:
    """What one rank wrote: names of tensors, modules with a zero delta, largest magnitude."""

    written: list[str]
    untrained: list[str] = field(default_factory=list)
    max_abs: float = 0.0


def read_base(plan: MergePlan, source: BaseWeight, device: torch.device = CPU) -> Tensor:
    """The base's weight that an adapter is folded onto, decoded as `BaseWeight.folded_as_trained` says."""
    return plan.base.read(source.name, device, as_trained=source.folded_as_trained(plan.stored))


def compute(plan: MergePlan, op: Op, device: torch.device = CPU) -> tuple[Tensor, bool]:
    """One output tensor before rounding, and whether the adapter changes it.

    False means that the delta is zero.
    device: where weights are decoded and folded; a fold that is not `on_any_device` is computed on the CPU.
    Decoded values are the same on every device; the products of a fold may be summed in another order.
    """
    assert op.source is not None
    if op.role != "parameter" and op.replacement is None and op.source.kind == "stored":
        return plan.base.checkpoint.read(op.source.name), True
    if not all(fold.on_any_device for fold in (*op.folds, *op.bias_folds)):
        device = CPU
    value = load_tensor(op.replacement, device) if op.replacement else read_base(plan, op.source, device)
    if op.folds:
        value = value.float()
        oriented = value.T.contiguous() if op.conv1d else value
        changes = [fold.apply(oriented) for fold in op.folds]
        return (oriented.T if op.conv1d else oriented), any(changes)
    if op.bias_folds:
        value = value.float()
        for fold in op.bias_folds:
            value = fold.changed_bias(value.cpu())
    return value, True


def _computed(plan: MergePlan, ops: Sequence[Op], device: torch.device) -> Iterator[tuple[Op, Tensor, bool]]:
    """Every output tensor before rounding."""
    if device.type == "cpu":
        return ((op, *compute(plan, op)) for op in ops)
    return computed_ahead(plan, ops, device)


def computed_ahead(plan: MergePlan, ops: Sequence[Op], device: torch.device) -> Iterator[tuple[Op, Tensor, bool]]:
    """Output tensors before rounding, computed on a GPU one tensor ahead.

    The next tensor is read and computed while the last is rounded and written.
    """
    with ThreadPoolExecutor(1) as reader, matmul_precision.full_precision():
        coming = [reader.submit(compute, plan, op, device) for op in ops[:1]]
        for op, following in zip(ops, [*ops[1:], None], strict=True):
            computed = coming.pop().result()
            if following is not None:
                coming.append(reader.submit(compute, plan, following, device))
            yield op, *computed


def merge(
    plan: MergePlan,
    out: str | Path,
    *,
    dtype: Literal["auto", "float16", "bfloat16", "float32"],
    max_shard: int = 5 * 10**9,
    device: torch.device = CPU,
    stops: StopTokens | None = None,
    progress: Progress | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> MergeResult:
    """Write the merged checkpoint into the directory `out`, computing on `device`.

    stops: tokens that end a turn of the fine-tune and that the base's configs lack. ranks: processes that share the
    tensors, called by the first one; on equal devices the bytes do not depend on their number.
    Raises StageError naming the tensor for NaN/inf in the base or adapter, overflow of `dtype`, or a full disk.
    """
    refusals.open_expert_orders(plan.adapters)
    out = Path(out)
    make_directory(out)
    chosen, why = choose_dtype(plan, dtype)
    target = DTYPES[chosen]
    plan = replace(plan, stored=target)
    result = MergeResult(
        dtype=chosen,
        why=why,
        onto=plan.base.onto(target),
        ledger=plan.ledger,
        carried=plan.carried,
        stop_tokens=str(stops) if stops else None,
        warnings=list(plan.warnings),
    )
    with CheckpointWriter(out, plan.slots(target), max_bytes=max_shard) as writer:
        own = {"writer": writer, "progress": progress}
        parts = ranks.call(write_share, plan, out, max_shard=max_shard, device=device, first_rank_only=own)
        for part in parts:
            writer.mark_written(part.written)
        writer.close()
        result.bytes = writer.total_size
    result.untrained = [module for part in parts for module in part.untrained]
    result.max_abs = max(part.max_abs for part in parts)
    if len(result.untrained) == sum(len(op.folds) for op in plan.ops) and not any(a.replaced for a in plan.adapters):
        raise StageError(UNTRAINED.format(refusals.paths(plan.adapters)))
    _write_small_files(plan, out, chosen, stops)
    return result


def write_share(
    plan: MergePlan,
    out: Path,
    *,
    max_shard: int,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
    writer: CheckpointWriter | None = None,
    progress: Progress | None = None,
) -> list[Share]:
    """Write this rank's tensors into shards that the first rank has laid out; what each rank wrote.

    plan: with `stored`, the dtype of the file. writer, progress: on the first rank only.
    """
    ops = own_ops(plan, ranks)
    share, device = Share([op.name for op in ops]), ranks.device_of(device)
    with ExitStack() as until:
        if writer is None:
            writer = until.enter_context(
                CheckpointWriter(out, plan.slots(plan.stored), max_bytes=max_shard, resume=True)
            )
            if not writer.kept:  # its tensors would be in other files than the first rank's
                raise StageError(f"{out}: rank {ranks.rank} cannot open the files of the first rank: use one disk")
        _write_each(plan, ops, device, writer, share, progress)
        if not ranks.first:
            writer.sync()
    return ranks.all_gather_objects(share)


def own_ops(plan: MergePlan, ranks: Ranks) -> tuple[Op, ...]:
    """This rank's tensors: neighbours, with an equal part of the bytes, so that ranks write different shards."""
    sizes = [slot.nbytes for slot in plan.slots(plan.stored)]
    total, ends = max(1, sum(sizes)), accumulate(sizes)
    owners = [
        min(ranks.count - 1, (end - size // 2) * ranks.count // total) for size, end in zip(sizes, ends, strict=True)
    ]
    return tuple(op for op, owner in zip(plan.ops, owners, strict=True) if owner == ranks.rank)


def _write_each(
    plan: MergePlan,
    ops: Sequence[Op],
    device: torch.device,
    writer: CheckpointWriter,
    share: Share,
    progress: Progress | None,
) -> None:
    """Compute, round and write tensors; one is written while the next is computed, never more."""
    with ThreadPoolExecutor(1) as disk:
        writing: Future[None] | None = None
        for done, (op, value, changes) in enumerate(_computed(plan, ops, device), 1):
            if not changes:
                share.untrained += [fold.module for fold in op.folds]
            rounded = _round(plan, op, value, target_dtype(op, plan.stored), share)
            if writing is not None:
                writing.result()
            writing = disk.submit(writer.write, op.name, rounded)
            if progress:
                progress(done * len(plan.ops) // len(ops), len(plan.ops))
        if writing is not None:
            writing.result()


def _round(plan: MergePlan, op: Op, value: Tensor, dtype: torch.dtype, share: Share) -> Tensor:
    """The one rounding; raises StageError unless every value is finite afterwards."""
    rounded = value.to(dtype)
    if not dtype.is_floating_point or (op.role == "state" and op.replacement is None):
        return rounded
    largest = largest_magnitude(rounded)
    if not largest < float("inf"):  # also NaN
        unrounded = largest_magnitude(value.float())
        if unrounded < float("inf"):
            raise StageError(
                f"{op.name}: {unrounded:.4g} overflows {str(dtype).removeprefix('torch.')}: "
                "set merge.dtype to bfloat16 or auto"
            )
        whose = "adapter or base" if op.folds or op.replacement else "base"
        assert op.source is not None
        bad, held = count_not_finite(value), op.replacement or plan.base.checkpoint[op.source.name]
        raise StageError(
            f"{op.name}: NaN or infinity in the {whose} weights: {bad} of {value.numel()} values ({held.file}"
            + (", or the adapter's file)" if op.folds else ")")
        )
    share.max_abs = max(share.max_abs, largest)
    return rounded


def _write_small_files(plan: MergePlan, out: Path, dtype: str, stops: StopTokens | None) -> None:
    source = plan.base.checkpoint
    config = model_files.edit_config(source.config, dtype=dtype, untie=plan.untied, vocab_size=plan.vocab_size)
    if stops is not None:
        config = model_files.with_eos(config, stops.config)
    model_files.write_json(out / "config.json", config)
    model_files.copy_small_files(source.path, out, adapter=plan.adapter.path)
    if stops is not None:
        generation = model_files.generation_config(out) or {}
        model_files.write_json(out / "generation_config.json", generation | {"eos_token_id": list(stops.generation)})

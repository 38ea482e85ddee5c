"""Healing block by block, for models that do not fit whole: each towards the merged block.

The scales, codes or norms of one block are trained at once, as in EfficientQAT (https://arxiv.org/abs/2407.11062,
Block-AP): its input is the output of the healed blocks before it, its target the output of the merged model's block.
Of a finished block only its output stays on the device; its values are in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from requant.checkpoint.atomic_write import read_state
from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.writer import load_tensor, load_tensors, save_tensors
from requant.errors import StageError
from requant.formats.quantized_format import Reader
from requant.formats.registry import open_quantized
from requant.heal import student
from requant.heal.block_streams import Streams
from requant.heal.codes import integers
from requant.heal.curve import Judgement, Look, LossCurve
from requant.heal.job import HealJob, Progress
from requant.heal.latents import OriginalWeights, TrainableCodes
from requant.heal.student import Student
from requant.heal.teacher import product_dtype
from requant.heal.trainer import Trainer
from requant.modeling import skeleton
from requant.modeling.block_walk import Walk
from requant.modeling.blocks import block_list
from requant.modeling.token_ends import TokenEnds
from requant.runtime.device import free_memory


class BlockErrors(TypedDict):
    """One block's relative error on the held-out windows, for the report.

    start, best: before and after healing. held: [steps, error] of every look. changed: share of its codes; None where
    they were not trained.
    """

    block: int
    start: float
    best: float
    best_step: int
    held: list[list[float]]
    changed: float | None


class HealedValues(Mapping[str, Tensor]):
    """Healed values by stored name, as of `Student.values`; codes are read from their block's file when asked for."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor | Callable[[], Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        value = self._found[name]
        return value if isinstance(value, Tensor) else value()

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def add(self, part: Student, file: Path) -> None:
        """Add the values of a block whose snapshots are in a file."""
        for number, vector in enumerate(part.trainable):
            if isinstance(vector, TrainableCodes):
                order = None if vector.codes.order is None else vector.codes.order.cpu()
                self._found[vector.name] = partial(_stored_codes, file, number, vector.codes.columns, order)
            else:
                self.put({name: value.cpu() for name, value in vector.values().items()})

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Add these, in place of those of the same names."""
        self._found |= values


def _stored_codes(file: Path, number: int, columns: int, order: Tensor | None) -> Tensor:
    """The codes of one linear of a finished block, uint8 [out, in] in the order of the checkpoint.

    Raises StageError where the file was damaged or removed since.
    """
    try:
        stored = load_tensor(file, f"value.{number}")
    except (SafetensorError, OSError) as error:
        raise StageError(f"{file}: not readable ({error}): the same command heals this block again") from error
    return integers(stored, columns, order)


class _Student:
    """The student's blocks, of which one at a time has weights."""

    def __init__(self, job: HealJob) -> None:
        self.job = job
        self.reader: Reader = open_quantized(job.source)
        self.model: Any = skeleton.open_model(job.source, trust_remote_code=job.trust_remote_code)
        self.names = skeleton.tensor_names(self.model, self.reader)
        skeleton.buffers_to(self.model, job.device, self.reader.checkpoint)
        self.prefix, self.items = block_list(self.model)
        self.original = None
        if "codes" in job.tune:
            self.original = OriginalWeights(job.teacher, trust_remote_code=job.trust_remote_code)

    def load(self, index: int) -> Student:
        """One block with its weights and its trainable values."""
        dtype, prefix = product_dtype(self.job.device), f"{self.prefix}.{index}."
        layers = student.fill(self.model, prefix, self.reader, self.names, device=self.job.device, dtype=dtype)
        vectors = student.trainable_vectors(
            self.model, prefix, layers, self.job.tune, checkpoint=self.reader.checkpoint, names=self.names, dtype=dtype,
            original=self.original,
        )  # fmt: skip
        return Student(self.items[index], vectors)

    def head(self) -> Tensor | None:
        """The weight of a quantized head, fp32 [vocab, width] on the device; None where it is not quantized."""
        name = TokenEnds.of(self.model).head
        stored = self.names.get(f"{name}.weight")
        return self.reader.read(stored, self.job.device) if stored in self.reader.quantized else None

    def release(self, index: int) -> None:
        """Forget a block."""
        self.items[index] = nn.Identity()


def heal_blocks(job: HealJob, progress: Progress | None = None) -> tuple[HealedValues, LossCurve, list[BlockErrors]]:
    """Heal a checkpoint block by block towards the 16-bit model.

    The checkpoint is `job.source`, the 16-bit model `job.teacher`.
    Each finished block is a file in `job.work`, valid for `job.key`. Returns the new values by stored name, a curve of
    two points (KL of start and end on the windows that choose; judged: on those that judge) and each block's errors.
    """
    text, device, micro = job.text, job.device, job.plan.micro_batch
    walk = _walk(job.teacher, device, trust_remote_code=job.trust_remote_code)
    train = min(text.train, job.plan.windows or text.train) // micro * micro
    windows = torch.cat([text.windows[:train], text.windows[text.train :]])
    streams = Streams(
        walk, windows, held_out=text.held_out, choosing=text.choosing, micro_batch=micro, on_host=job.plan.on_host
    )
    blocks, values, errors = _Student(job), HealedValues(), list[BlockErrors]()
    for index in range(len(walk)):
        streams.advance(streams.teacher, walk.load(index), index)
        walk.release(walk.blocks[index])
        error = _heal_block(blocks, streams, index, train, values)
        errors += [error] if error else []
        free_memory(device)
        if progress:
            found = f", error {error['start']:.2e} -> {error['best']:.2e}" if error else ""
            progress(index + 1, len(walk), f"blocks{found}")
    start, end = streams.compare_with_teacher(windows.to(device), text.held_out_sources, blocks.head())
    judged = text.choosing
    curve = LossCurve([], [Look(0, start.part(0, judged)), Look(job.settings.steps, end.part(0, judged))])
    if text.judging:
        curve.judged = Judgement.of(start.part(judged), end.part(judged), job.settings.steps)
    return values, curve, errors


def _heal_block(blocks: _Student, streams: Streams, index: int, train: int, values: HealedValues) -> BlockErrors | None:
    """Heal one block and run the streams through it; its values are added. Nothing else of it stays in memory.

    None: nothing of it is trained.
    """
    file, part = blocks.job.work / f"block-{index:04d}", blocks.load(index)
    streams.advance(streams.unhealed, part.model, index)
    if not part.trainable:
        streams.advance(streams.student, part.model, index)
        blocks.release(index)
        return None
    curve = _train(part, streams, index, train, blocks.job, file)
    streams.advance(streams.student, part.model, index)
    values.add(part, file)
    blocks.release(index)
    first, best = curve.held_out[0], curve.best
    return {
        "block": index,
        "start": first.mean_kl,
        "best": best.mean_kl,
        "best_step": best.steps,
        "held": [[look.steps, look.mean_kl] for look in curve.held_out],
        "changed": _changed(part),
    }


def _changed(part: Student) -> float | None:
    """The share of a block's codes that are others than the file's."""
    codes = [v for v in part.trainable if isinstance(v, TrainableCodes)]
    return sum(v.changed() for v in codes) / sum(v.offset.numel() for v in codes) if codes else None


def _train(part: Student, streams: Streams, index: int, train: int, job: HealJob, file: Path) -> LossCurve:
    """Heal one block, or load the finished one from its file."""
    key = f"{job.state_key} {train}"
    stored = read_state(file, lambda saved: _saved_block(saved, part, key))
    if stored is not None:
        curve, values = stored
        for vector, value in zip(part.trainable, values, strict=True):
            vector.adopt(value)
        return curve
    trainer = Trainer(
        part, streams.loss(part.model, index), streams.measure(part.model, index), job.settings,
        train=train, choosing=job.text.choosing, sources=job.text.held_out_sources, micro_batch=job.plan.micro_batch,
    )  # fmt: skip
    curve = trainer.run(None)
    tensors = {f"value.{i}": vector.snapshot().cpu() for i, vector in enumerate(part.trainable)}
    save_tensors(file, tensors, {"key": key, "curve": curve.to_json()})
    return curve


def _saved_block(file: Path, part: Student, key: str) -> tuple[LossCurve, list[Tensor]] | None:
    """Curve and values of a finished block; None where they belong to another key."""
    meta, tensors = load_tensors(file)
    if meta["key"] != key:
        return None
    values = [tensors[f"value.{i}"] for i in range(len(part.trainable))]
    if any(value.shape != v.start().shape for value, v in zip(values, part.trainable, strict=True)):
        raise ValueError("its values have other shapes")
    return LossCurve.from_json(meta["curve"]), values


def _walk(path: Path, device: torch.device, *, trust_remote_code: bool) -> Walk:
    model = skeleton.open_model(path, trust_remote_code=trust_remote_code)
    return Walk(Checkpoint(path), model, device=device, dtype=product_dtype(device))

"""Healing block by block, for models that do not fit whole: each towards the merged block.

One block of student and teacher is resident, and three streams of hidden states: the merged model's, the healed
student's, and on the held-out windows the unhealed student's, with which the result is compared: the windows that
choose each block's best step, and those that judge the whole. The input of a
student's block is the output of the healed blocks before it; its target is the output of the merged model's block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from requant.checkpoint.atomic_write import read_state
from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.writer import load_tensors, save_tensors
from requant.formats.registry import open_quantized
from requant.heal import kl_loss, student
from requant.heal.curve import Judgement, Look, LossCurve, Windows
from requant.heal.job import HealJob, Progress
from requant.heal.plan import BLOCK_WINDOWS
from requant.heal.student import Student
from requant.heal.teacher import head_of, precision, product_dtype
from requant.heal.trainer import Measure, Trainer
from requant.modeling import skeleton
from requant.modeling.block_walk import Walk
from requant.modeling.blocks import block_list
from requant_eval.scoring.lm_head import HeadTap


class BlockErrors(TypedDict):
    """One block's relative error on the held-out windows, for the report.

    start, best: before and after healing.
    """

    block: int
    start: float
    best: float
    best_step: int


class Streams:
    """Hidden states [n, length, width] of all windows before the current block.

    arguments: the other arguments of every block, by number of windows in a batch.
    """

    def __init__(self, walk: Walk, windows: Tensor, *, held_out: int, choosing: int, micro_batch: int) -> None:
        batches = torch.split(windows, micro_batch)
        shorter = {choosing % micro_batch, held_out % micro_batch} - {0}  # the last batch of these windows alone
        items = walk.embed_all([*batches, *(windows[:count] for count in shorter)])
        self.walk, self.micro_batch, self.held_out = walk, micro_batch, held_out
        self.arguments = {len(item.hidden): item.arguments for item in items}
        self.teacher = torch.cat([item.hidden for item in items[: len(batches)]]).to(product_dtype(walk.device))
        self.student = self.teacher.clone()
        self.unhealed = self.teacher[len(windows) - held_out :].clone()
        self.tail = walk.tail

    def forward(self, block: nn.Module, hidden: Tensor, index: int) -> Tensor:
        """The output of one block on a few windows, with fp32 hidden states."""
        with precision(self.walk.device):
            return self.walk.forward(block, hidden.float(), self.arguments[len(hidden)][index])

    @torch.no_grad()
    def advance(self, stream: Tensor, block: nn.Module, index: int) -> None:
        """Replace a stream by the block's output, in place."""
        for at in range(0, len(stream), self.micro_batch):
            part = stream[at : at + self.micro_batch]
            part.copy_(self.forward(block, part, index))

    def loss(self, block: nn.Module, index: int) -> Callable[[Sequence[int]], Tensor]:
        """The loss of one block: the sum of its relative errors on windows.

        The teacher's stream must be one block ahead.
        """

        def of(numbers: Sequence[int]) -> Tensor:
            return self._errors(block, index, numbers).sum()

        return of

    def measure(self, block: nn.Module, index: int) -> Measure:
        """The relative error of a block on each window, in the place of a KL; there is no loss of the text."""

        def of(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
            errors = self._errors(block, index, numbers).double().cpu()
            return errors, torch.zeros_like(errors)

        return of

    def _errors(self, block: nn.Module, index: int, numbers: Sequence[int]) -> Tensor:
        chosen = list(numbers)
        return kl_loss.relative_error(self.forward(block, self.student[chosen], index), self.teacher[chosen])


class AfterBlocks:
    """The part of a model after its last block, up to the input of the head."""

    def __init__(self, walk: Walk, ids: Tensor, streams: Streams) -> None:
        """ids: any int64 [1, length]."""
        self.model, self.ids, self.states = walk.model, ids, streams.teacher[:1].float()
        walk.fill_rest()
        for block in walk.blocks:
            block.forward = lambda *_, **__: self.states if streams.tail is None else (self.states, *streams.tail)
        self.tap = HeadTap(self.model)
        self.head = head_of(self.model, ids)

    @torch.no_grad()
    def hidden(self, states: Tensor) -> Tensor:
        """Hidden states before the head from those after the last block, both [n, length, width]."""
        self.states = states.float()
        with precision(states.device):
            return self.tap.run(self.model, self.ids.expand(len(states), -1))[0]


def heal_blocks(
    job: HealJob, progress: Progress | None = None
) -> tuple[dict[str, Tensor], LossCurve, list[BlockErrors]]:
    """Heal a checkpoint block by block towards the 16-bit model.

    The checkpoint is `job.source`, the 16-bit model `job.teacher`.
    Each finished block is a file in `job.work`, valid for `job.key`. Returns the new values by stored name, a curve of
    two points (KL of start and end on the windows that choose; judged: on those that judge) and each block's errors.
    """
    text, device, micro = job.text, job.device, job.plan.micro_batch
    walk = _walk(job.teacher, device, trust_remote_code=job.trust_remote_code)
    model, names = _student_skeleton(job.source, device, trust_remote_code=job.trust_remote_code)
    prefix, items = block_list(model)
    train = min(text.train, BLOCK_WINDOWS) // micro * micro
    windows = torch.cat([text.windows[:train], text.windows[text.train :]])
    streams = Streams(walk, windows, held_out=text.held_out, choosing=text.choosing, micro_batch=micro)
    values: dict[str, Tensor] = {}
    errors: list[BlockErrors] = []
    for index in range(len(walk)):
        streams.advance(streams.teacher, walk.load(index), index)
        walk.release(walk.blocks[index])
        part = _load_block(model, items[index], f"{prefix}.{index}.", names, job)
        streams.advance(streams.unhealed, part.model, index)
        curve = _train(part, streams, index, train, job)
        streams.advance(streams.student, part.model, index)
        values |= {name: value.cpu() for name, value in part.values().items()}
        first, best = curve.held_out[0], curve.best
        errors.append({"block": index, "start": first.mean_kl, "best": best.mean_kl, "best_step": best.steps})
        items[index] = nn.Identity()  # its weights are no longer needed
        if progress:
            progress(index + 1, len(walk), f"blocks, error {errors[-1]['start']:.2e} -> {best.mean_kl:.2e}")
    start, end = _compare_with_teacher(walk, streams, windows.to(device), text.held_out_sources)
    judged = text.choosing
    curve = LossCurve([], [Look(0, start.part(0, judged)), Look(job.settings.steps, end.part(0, judged))])
    if text.judging:
        curve.judged = Judgement.of(start.part(judged), end.part(judged), job.settings.steps)
    return values, curve, errors


def _train(part: Student, streams: Streams, index: int, train: int, job: HealJob) -> LossCurve:
    """Heal one block, or load the finished one from its file."""
    file = job.work / f"block-{index:04d}"
    trainer = Trainer(
        part, streams.loss(part.model, index), streams.measure(part.model, index), job.settings,
        train=train, choosing=job.text.choosing, sources=job.text.held_out_sources, micro_batch=job.plan.micro_batch,
    )  # fmt: skip
    stored = read_state(file, lambda saved: _saved_block(saved, part, job.key))
    if stored is not None:
        curve, values = stored
        for vector, value in zip(part.trainable, values, strict=True):
            vector.adopt(value)
        return curve
    curve = trainer.run(None)
    tensors = {f"value.{i}": vector.snapshot().cpu() for i, vector in enumerate(part.trainable)}
    save_tensors(file, tensors, {"key": job.key, "curve": curve.to_json()})
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


def _student_skeleton(path: Path, device: torch.device, *, trust_remote_code: bool) -> tuple[Any, dict[str, str]]:
    """(structure of the student without weights, parameter -> stored name)."""
    model: Any = skeleton.open_model(path, trust_remote_code=trust_remote_code)
    reader = open_quantized(path)
    names = skeleton.tensor_names(model, reader)
    skeleton.buffers_to(model, device, reader.checkpoint)
    return model, names


def _load_block(model: Any, block: nn.Module, prefix: str, names: Mapping[str, str], job: HealJob) -> Student:
    """One block of the student with its weights."""
    dtype, reader = product_dtype(job.device), open_quantized(job.source)
    layers = student.fill(model, prefix, reader, names, device=job.device, dtype=dtype)
    vectors = student.trainable_vectors(
        model, prefix, layers, job.tune, checkpoint=reader.checkpoint, names=names, dtype=dtype
    )
    return Student(block, vectors)


def _compare_with_teacher(
    walk: Walk, streams: Streams, windows: Tensor, sources: Sequence[int]
) -> tuple[Windows, Windows]:
    """The held-out windows with the unhealed and with the healed student, against the merged model."""
    after = AfterBlocks(walk, windows[:1], streams)
    begin = len(streams.teacher) - streams.held_out
    found = []
    for stream, offset in ((streams.unhealed, 0), (streams.student, begin)):
        each = []
        for i in range(streams.held_out):
            teacher, healed = (after.hidden(s[None]) for s in (streams.teacher[begin + i], stream[offset + i]))
            ids = windows[begin + i][None]
            each.append(kl_loss.measured(healed, after.head, teacher, after.head, ids, product_dtype(walk.device)))
        kl, loss = (torch.cat(values) for values in zip(*each, strict=True))
        found.append(Windows(kl, loss, sources))
    return found[0], found[1]

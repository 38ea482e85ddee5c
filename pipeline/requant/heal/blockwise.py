"""Healing for models whose student and teacher do not fit together: each block against the merged model's block.

One block of each is resident, and three streams of hidden states: the merged model's, the healed student's, and on the
held-out windows the unhealed student's, so that the end can be compared with the start. A student's block takes what
the healed blocks before it give, and learns to answer with what the merged model has there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from requant.checkpoint.reader import Checkpoint
from requant.formats import gptq as gptq_format
from requant.heal import kl_loss, student
from requant.heal.plan import BLOCK_WINDOWS
from requant.heal.student import Student
from requant.heal.teacher import Progress, head_of, precision, product_dtype
from requant.heal.trainer import Curve, Settings, Trainer
from requant.modeling import skeleton
from requant.modeling.block_walk import Walk, block_list
from requant_eval.scoring.lm_head import HeadTap


class Streams:
    """Hidden states [n, length, width] of all windows at the current block, and what else its blocks are given."""

    def __init__(self, walk: Walk, windows: Tensor, held: int, micro: int) -> None:
        items = walk.embed(windows, micro)
        self.walk, self.micro, self.held = walk, micro, held
        self.arguments = {len(item.hidden): item.arguments for item in items}
        self.theirs = torch.cat([item.hidden for item in items]).to(product_dtype(walk.device))
        self.ours = self.theirs.clone()
        self.unhealed = self.theirs[len(windows) - held :].clone()
        self.tail = walk.tail

    def forward(self, block: nn.Module, hidden: Tensor, index: int) -> Tensor:
        """One block on a few windows, in fp32 hidden states."""
        with precision(self.walk.device):
            return self.walk.forward(block, hidden.float(), self.arguments[len(hidden)][index])

    @torch.no_grad()
    def advance(self, stream: Tensor, block: nn.Module, index: int) -> None:
        """Replace a stream by what `block` makes of it."""
        for at in range(0, len(stream), self.micro):
            part = stream[at : at + self.micro]
            part.copy_(self.forward(block, part, index))

    def loss(self, block: nn.Module, index: int) -> Callable[[Sequence[int]], Tensor]:
        """Relative error of `block` on windows, summed; the merged stream must already be one block ahead."""

        def of(numbers: Sequence[int]) -> Tensor:
            chosen = list(numbers)
            return len(chosen) * kl_loss.relative_error(
                self.forward(block, self.ours[chosen], index), self.theirs[chosen]
            )

        return of


class Shell:
    """The model around its blocks: from hidden states after the last block to the head's input."""

    def __init__(self, walk: Walk, ids: Tensor, streams: Streams) -> None:
        """ids: int64 [1, length], any."""
        self.model, self.ids, self.given = walk.model, ids, streams.theirs[:1].float()
        walk.fill_rest()
        for block in walk.blocks:
            block.forward = lambda *_, **__: self.given if streams.tail is None else (self.given, *streams.tail)
        self.tap = HeadTap(self.model)
        self.head = head_of(self.model, ids)

    @torch.no_grad()
    def hidden(self, states: Tensor) -> Tensor:
        """[n, length, width] after the last block -> the same before the head."""
        self.given = states.float()
        with precision(states.device):
            return self.tap.run(self.model, self.ids.expand(len(states), -1))[0]


def heal_blocks(
    source: Path, teacher: Path, windows: Tensor, held: int, settings: Settings, *, device: torch.device, micro: int,
    state: Path, key: str, trust_remote_code: bool = False, progress: Progress | None = None,
) -> tuple[dict[str, Tensor], Curve, list[dict[str, Any]]]:  # fmt: skip
    """Heal the GPTQ checkpoint `source` towards the 16-bit model `teacher`, a block at a time.

    The last `held` windows are held out. Each finished block is a file in `state`, which belongs to `key`. Returns the
    new values by stored name, a curve of two points (KL on held-out windows of start and end) and each block's errors.
    """
    walk = _walk(teacher, device, trust_remote_code)
    pupil, names = _pupil(source, device, trust_remote_code)
    prefix, items = block_list(pupil)
    train = min(len(windows) - held, BLOCK_WINDOWS) // micro * micro
    windows = torch.cat([windows[:train], windows[len(windows) - held :]])
    streams = Streams(walk, windows, held, micro)
    values: dict[str, Tensor] = {}
    told: list[dict[str, Any]] = []
    for index in range(len(walk)):
        streams.advance(streams.theirs, walk.load(index), index)
        walk.release(walk.blocks[index])
        part = _load_block(pupil, items[index], f"{prefix}.{index}.", Checkpoint(source), names, settings, device)
        streams.advance(streams.unhealed, part.model, index)
        curve = _train(
            part, streams.loss(part.model, index), train, held, settings, micro, state / f"block-{index:04d}", key
        )
        streams.advance(streams.ours, part.model, index)
        values |= {name: value.cpu() for name, value in part.values().items()}
        told.append({"block": index, "start": curve.held[0][1], "best": curve.best[1], "best_step": curve.best[0]})
        items[index] = nn.Identity()  # its weights are no longer needed
        if progress:
            progress(index + 1, len(walk), f"block error {told[-1]['start']:.2e} -> {told[-1]['best']:.2e}")
    return values, _judge(walk, streams, windows.to(device), settings.steps), told


def _train(
    part: Student, loss: Callable[[Sequence[int]], Tensor], train: int, held: int, settings: Settings, micro: int,
    file: Path, key: str,
) -> Curve:  # fmt: skip
    """Heal one block, or take the finished one from `file`."""
    trainer = Trainer(part, loss, train, held, settings, micro=micro)
    if file.exists():
        with safe_open(file, framework="pt") as stored:
            if stored.metadata().get("key") == key:
                for i, m in enumerate(part.movable):
                    m.offset.copy_(stored.get_tensor(f"offset.{i}"))
                part.refresh()
                points = json.loads(stored.metadata()["curve"])
                return Curve(points["train"], [(int(n), v) for n, v in points["held"]], points["stopped"])
    curve = trainer.run(None)
    tensors = {f"offset.{i}": m.offset.detach().cpu() for i, m in enumerate(part.movable)}
    temporary = file.with_name(file.name + ".tmp")
    save_file(tensors, temporary, {"key": key, "curve": json.dumps(asdict(curve))})
    temporary.replace(file)
    return curve


def _walk(path: Path, device: torch.device, trust: bool) -> Walk:
    model = skeleton.open_model(path, trust_remote_code=trust)
    return Walk(Checkpoint(path), model, device=device, dtype=product_dtype(device))


def _pupil(path: Path, device: torch.device, trust: bool) -> tuple[Any, dict[str, str]]:
    """(structure of the student without weights, parameter -> stored name)."""
    model: Any = skeleton.open_model(path, trust_remote_code=trust)
    names = skeleton.tensor_names(model, gptq_format.stored_names(Checkpoint(path)))
    skeleton.buffers_to(model, device)
    return model, names


def _load_block(
    model: Any, block: nn.Module, where: str, checkpoint: Checkpoint, names: Mapping[str, str], settings: Settings,
    device: torch.device,
) -> Student:  # fmt: skip
    dtype = product_dtype(device)
    layers = student.fill(
        model, where, checkpoint, names, device=device, dtype=dtype, v2=gptq_format.is_v2(checkpoint.path)
    )
    return Student(block, student.movable(model, where, layers, settings.tune, checkpoint, names, dtype))


def _judge(walk: Walk, streams: Streams, windows: Tensor, steps: int) -> Curve:
    """KL of the unhealed and the healed student from the merged model, on the held-out windows."""
    shell = Shell(walk, windows[:1], streams)
    begin, points = len(streams.theirs) - streams.held, []
    for stream, offset in ((streams.unhealed, 0), (streams.ours, begin)):
        total = 0.0
        for i in range(streams.held):
            theirs, ours = (shell.hidden(s[None])[0] for s in (streams.theirs[begin + i], stream[offset + i]))
            total += float(kl_loss.divergence(ours, shell.head, theirs, shell.head, product_dtype(walk.device)))
        points.append(total / (streams.held * windows.shape[1]))
    return Curve([], [(0, points[0]), (steps, points[1])])

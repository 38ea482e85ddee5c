"""Hidden states between blocks: the merged model's, the healed and the unhealed student's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from requant.heal import kl_loss
from requant.heal.curve import Windows
from requant.heal.teacher import head_of, precision, product_dtype
from requant.heal.trainer import Measure
from requant.modeling.block_walk import BlockArguments, Walk
from requant.numerics.token_errors import relative_error
from requant.runtime.pinned_memory import PinnedBuffer
from requant_eval.scoring.lm_head import HeadTap

EMBEDDED = 256  # windows whose embeddings are on the device at once


class Streams:
    """Hidden states [n, length, width] of all windows before the current block.

    teacher, student: of all windows, on the device or, `on_host`, in host memory. unhealed: of the held-out windows.
    arguments: the other arguments of every block, by number of windows in a batch.
    """

    def __init__(
        self, walk: Walk, windows: Tensor, *, held_out: int, choosing: int, micro_batch: int, on_host: bool = False
    ) -> None:
        self.walk, self.micro_batch, self.held_out = walk, micro_batch, held_out
        self.arguments: dict[int, list[BlockArguments | None]] = {}
        self._buffers = (PinnedBuffer(), PinnedBuffer())
        dtype, place = product_dtype(walk.device), torch.device("cpu") if on_host else walk.device
        shorter = {choosing % micro_batch, held_out % micro_batch} - {0}  # the last batch of these windows alone
        for count in shorter:
            self._embed([windows[:count]])
        at, step = 0, micro_batch * -(-EMBEDDED // micro_batch)
        for part in torch.split(windows, step):
            hidden = self._embed(torch.split(part, micro_batch))
            if not at:
                shape = (len(windows), *hidden.shape[1:])
                self.teacher = torch.empty(shape, dtype=dtype, device=place)
            self.teacher[at : at + len(hidden)] = hidden
            at += len(hidden)
        self.student = self.teacher.clone()
        self.unhealed = self.teacher[len(windows) - held_out :].clone()
        self.tail = walk.tail

    def _embed(self, batches: Sequence[Tensor]) -> Tensor:
        """The input of the first block; the arguments of batches of such sizes are kept."""
        items = self.walk.embed_all(batches)
        self.arguments |= {len(item.hidden): item.arguments for item in items}
        return torch.cat([item.hidden for item in items])

    def forward(self, block: nn.Module, hidden: Tensor, index: int) -> Tensor:
        """The output of one block on a few windows, with fp32 hidden states."""
        with precision(self.walk.device):
            return self.walk.forward(block, hidden.float(), self.arguments[len(hidden)][index])

    @torch.no_grad()
    def advance(self, stream: Tensor, block: nn.Module, index: int) -> None:
        """Replace a stream by the block's output, in place."""
        for at in range(0, len(stream), self.micro_batch):
            part = stream[at : at + self.micro_batch]
            part.copy_(self.forward(block, part.to(self.walk.device), index))

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
        student, teacher = (
            self._chosen(stream, numbers, buffer)
            for stream, buffer in zip((self.student, self.teacher), self._buffers, strict=True)
        )
        return relative_error(self.forward(block, student, index), teacher)

    def _chosen(self, stream: Tensor, numbers: Sequence[int], buffer: PinnedBuffer) -> Tensor:
        """Some windows of a stream, on the device."""
        if stream.device.type == self.walk.device.type:  # whatever the index of `cuda`
            return stream[list(numbers)]
        return from_host(stream, numbers, buffer, self.walk.device)

    def compare_with_teacher(
        self, windows: Tensor, sources: Sequence[int], head: Tensor | None = None
    ) -> tuple[Windows, Windows]:
        """The held-out windows with the unhealed and with the healed student, after the last block.

        windows: ids int64 [n, length] of all windows, on the device. sources: of the held-out ones.
        head: weight [vocab, width] of the student's head; None: it is the teacher's.
        """
        after = AfterBlocks(self.walk, windows[:1], self)
        dtype = product_dtype(self.walk.device)
        own = after.head if head is None else replace(after.head, weight=head.to(dtype))
        begin, device = len(self.teacher) - self.held_out, self.walk.device
        found = []
        for stream, offset in ((self.unhealed, 0), (self.student, begin)):
            each = []
            for i in range(self.held_out):
                states = (self.teacher[begin + i], stream[offset + i])
                teacher, healed = (after.hidden(s[None].to(device)) for s in states)
                ids = windows[begin + i][None]
                each.append(kl_loss.measured(healed, own, teacher, after.head, ids, dtype))
            kl, loss = (torch.cat(values) for values in zip(*each, strict=True))
            found.append(Windows(kl, loss, sources))
        return found[0], found[1]


def from_host(stream: Tensor, numbers: Sequence[int], buffer: PinnedBuffer, device: torch.device) -> Tensor:
    """Some windows of a stream in host memory, on the device."""
    place = buffer.of_size(stream[0].nbytes * len(numbers)).view(stream.dtype).view(len(numbers), *stream.shape[1:])
    return torch.index_select(stream, 0, torch.tensor(list(numbers)), out=place).to(device)


class AfterBlocks:
    """The part of a model after its last block, up to the input of the head."""

    def __init__(self, walk: Walk, ids: Tensor, streams: Streams) -> None:
        """ids: any int64 [1, length]."""
        self.model, self.ids = walk.model, ids
        self.states = streams.teacher[:1].to(walk.device).float()
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

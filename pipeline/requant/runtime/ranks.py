"""What several processes at one model say to each other: torch.distributed, hidden from everybody else.

`Ranks` is one process alone: it shares nothing, starts nothing and costs nothing. `Several` is one of many; every rank must
make the same calls in the same order. Values that decide something travel between CPUs (gloo), tensors where they are
(NCCL between GPUs). Started and ended in `crew`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from requant.errors import InputError, StageError

T = TypeVar("T")
PANEL = 2048  # rows of a triangle summed up at a time: a copy of so many is all the memory it takes
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


class Ranks:
    """One process, which is all there is."""

    rank, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, logs and prints."""
        return self.rank == 0

    def place(self, device: torch.device) -> torch.device:
        """This rank's own device of that type."""
        return device

    def meet(self, device: torch.device) -> None:
        """Begin to find the other ranks' GPUs, beside what comes next, if that has not been begun; what needs them waits."""

    def share(self, total: int) -> slice:
        """This rank's part of `total` things in a row; parts differ by one at most."""
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that all have: as many for each, the last one again where they do not divide."""
        return whole

    def gather(self, part: Tensor, rows: int) -> Tensor:
        """All `rows` rows out of every rank's `rows(...)`, on every rank."""
        return part

    def pool(self, triangles: Sequence[Tensor], others: Sequence[Tensor], counts: Sequence[int]) -> list[int]:
        """Sum tensors over all ranks in place, the same bits on each; of `triangles` the upper one. Returns the summed counts."""
        return list(counts)

    def publish(self, tensor: Tensor, owner: int) -> Callable[[], None]:
        """Begin to broadcast the tensor of rank `owner` to the others; the result waits until it is there."""
        return lambda: None

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all ranks."""
        return list(numbers)

    def every(self, holds: bool) -> bool:
        """Whether it holds on every rank."""
        return self.total([not holds]) == [0]

    def tell(self, value: T) -> T:
        """The first rank's value, on every rank."""
        return value

    def everyone(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        return [value]

    def spread(self, tensor: Tensor) -> None:
        """Copy the first rank's tensor into that of the others."""

    def call(self, function: Callable[..., T], *args: Any, own: Mapping[str, Any], **kwargs: Any) -> T:
        """Run `function` on every rank, with `ranks` where there are several; `own` are arguments of the first alone.

        Called by the first rank while the others wait to be called.
        """
        return function(*args, **kwargs, **own)


ALONE = Ranks()


class Several(Ranks):
    """One process of several; torch.distributed is initialized.

    local: number on its machine, and of its GPU. store: what all ranks can read, whatever else they wait for.
    called: whether the others are at work. over: set when nobody will be called any more. failing: held, for good, by
    the thread that says why all of them end. watching: the thread that looks into the store until it is over.
    """

    meeting: Future[None] | None = None  # of the GPUs of all ranks, once it was asked for

    def __init__(self, local: int, store: Any) -> None:
        self.rank, self.count, self.local, self.store = dist.get_rank(), dist.get_world_size(), local, store
        self.failing, self.over = threading.Lock(), threading.Event()
        self.called = False
        self.watching: threading.Thread | None = None

    def place(self, device: torch.device) -> torch.device:
        if device.type != "cuda":
            return device
        if device.index not in (None, 0, self.local):  # 0: the first rank's own, out of a call
            raise InputError(f"device: {device} names one GPU, but {self.count} ranks were started: use auto or cuda")
        return torch.device("cuda", self.local)

    def meet(self, device: torch.device) -> None:
        if device.type == "cuda" and self.meeting is None:  # NCCL's first sum takes a second; gloo has met
            pool = ThreadPoolExecutor(1)
            self.meeting = pool.submit(_first_sum, device)
            pool.shutdown(wait=False)

    def _met(self) -> None:
        """Every call on GPUs begins here: they are the same for all ranks, in the same order."""
        if self.meeting is not None:
            self.meeting.result()

    def part(self) -> None:
        """Before the end: GPUs that are about to meet have done so, or failed to."""
        if self.meeting is not None:
            self.meeting.exception()

    def rows(self, whole: Tensor) -> Tensor:
        each = -(-len(whole) // self.count)
        start, stop = self.rank * each, (self.rank + 1) * each
        if stop <= len(whole):
            return whole[start:stop]
        return whole[torch.arange(start, stop, device=whole.device).clamp_(max=len(whole) - 1)]

    def gather(self, part: Tensor, rows: int) -> Tensor:
        self._met()
        whole = part.new_empty(self.count * len(part), *part.shape[1:])
        _all_gather(whole, part.contiguous())
        return whole[:rows]

    def pool(self, triangles: Sequence[Tensor], others: Sequence[Tensor], counts: Sequence[int]) -> list[int]:
        numbers = self.total(counts)  # first: a GPU is still at what is to be summed up
        self._met()
        for tensor in others:
            dist.all_reduce(tensor)
        for tensor in triangles:
            for start in range(0, len(tensor), PANEL):
                panel = tensor[start : start + PANEL, start:]
                summed = panel.contiguous()
                dist.all_reduce(summed)
                if summed.data_ptr() != panel.data_ptr():
                    panel.copy_(summed)
        return [round(n) for n in numbers]

    def publish(self, tensor: Tensor, owner: int) -> Callable[[], None]:
        self._met()
        under_way: Any = dist.broadcast(tensor, src=owner, async_op=True)
        wait: Callable[[], None] = under_way.wait
        return wait

    def total(self, numbers: Sequence[float]) -> list[float]:
        summed = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def tell(self, value: T) -> T:
        return self._from(0, value)

    def everyone(self, value: T) -> list[T]:
        return [self._from(rank, value) for rank in range(self.count)]

    def _from(self, rank: int, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=rank, device=torch.device("cpu"))
        return box[0]

    def spread(self, tensor: Tensor) -> None:
        self._met()
        dist.broadcast(tensor.data, src=0)

    def call(self, function: Callable[..., T], *args: Any, own: Mapping[str, Any], **kwargs: Any) -> T:
        self.tell((function, args, kwargs))
        self.called = True
        try:
            result = function(*args, **kwargs, **own, ranks=self)
        except BaseException as error:
            self.failing.acquire()  # never released: nobody is left to be called
            if isinstance(error, RuntimeError) and "gloo" in str(error):  # what it says of a peer that is gone
                raise StageError(
                    "another rank was lost: the launcher says how; the same command goes on from here"
                ) from error
            raise
        self.called = False
        return result

    def serve(self) -> None:
        """Do what the first rank calls for, until it has no more use for this one."""
        while (job := self.tell(None)) is not None:
            function, args, kwargs = job
            function(*args, **kwargs, ranks=self)
        self._end()

    def dismiss(self) -> None:
        """Let all who wait to be called go."""
        self.tell(None)
        self._end()

    def _end(self) -> None:
        self.part()
        self.over.set()
        if self.watching:
            self.watching.join()  # a thread that is in the store when Python ends aborts the process
        self.every(True)  # the store may be the first rank's own: it stays until nobody looks into it


def _first_sum(device: torch.device) -> None:
    with torch.cuda.device(device):
        dist.all_reduce(torch.zeros(1, device=device))

"""Communication between the processes (ranks) that share a model, through torch.distributed.

`Ranks` is a single process: its methods return their arguments and start nothing. `DistributedRanks` is one process of
several. Every rank must make the same calls in the same order. Python values are sent between CPUs (gloo), tensors
between the devices that hold them (NCCL between GPUs). The process group is created and destroyed in `launch`.
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
LOST = "another rank ended without a word (killed, or out of memory?): the same command resumes the run"
_LOSS = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")  # in torch's messages
TRIANGLE_ROWS = 2048  # rows of a triangle in one all-reduce: memory is needed for a copy of these only
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


class Ranks:
    """A single process, and the interface of `DistributedRanks`."""

    rank, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, logs and prints."""
        return self.rank == 0

    def device_of(self, device: torch.device) -> torch.device:
        """This rank's device of the given type."""
        return device

    def connect(self, device: torch.device) -> None:
        """Start connecting the GPUs of all ranks in a thread, unless that was done.

        Calls that need them wait for it.
        """

    def share(self, total: int) -> slice:
        """This rank's part of a sequence of `total` items; the parts' lengths differ by one at most."""
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def own_rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that all ranks have.

        Equally many on each, padded with the last row.
        """
        return whole

    def all_gather_rows(self, part: Tensor, rows: int) -> Tensor:
        """The `rows` rows of the whole tensor, on every rank, from each rank's `own_rows(...)`."""
        return part

    def all_reduce(self, triangles: Sequence[Tensor], others: Sequence[Tensor], counts: Sequence[int]) -> list[int]:
        """Sum tensors over all ranks in place, with the same bits on each rank.

        Of `triangles` the upper triangle only.

        Returns the sums of `counts`.
        """
        return list(counts)

    def broadcast_async(self, tensor: Tensor, owner: int) -> Callable[[], None]:
        """Start to broadcast the tensor of rank `owner`.

        Returns a function that waits until the tensor has arrived.
        """
        return lambda: None

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Elementwise sums over all ranks."""
        return list(numbers)

    def all(self, holds: bool) -> bool:
        """Whether `holds` is true on every rank."""
        return self.sum([not holds]) == [0]

    def broadcast(self, value: T) -> T:
        """The first rank's value, on every rank."""
        return value

    def all_gather_objects(self, value: T) -> list[T]:
        """The values of all ranks, in the order of ranks."""
        return [value]

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Copy the first rank's tensor into the other ranks' tensors."""

    def claim_end(self) -> None:
        """Called before it is said why this process ends."""

    def call(self, function: Callable[..., T], *args: Any, first_rank_only: Mapping[str, Any], **kwargs: Any) -> T:
        """Run `function` on every rank, with the argument `ranks` if there are several.

        The first rank calls this.

        first_rank_only: keyword arguments that the other ranks do not get.
        """
        return function(*args, **kwargs, **first_rank_only)


SINGLE_PROCESS = Ranks()


class DistributedRanks(Ranks):
    """One process of several; torch.distributed is initialized.

    local: this rank's number on its machine, and the index of its GPU.
    store: the key-value store of all ranks; it can be read while a collective call waits.
    called: whether the other ranks run a function for the first one.
    signalled: whether a signal told this process to end.
    over: set when the first rank will make no more calls.
    failing: a lock that is never released; its holder, a thread, reports why all ranks end.
    watching: the thread that reads failures of other ranks from the store.
    """

    connecting: Future[None] | None = None  # the first sum over GPUs, once `connect` was called

    def __init__(self, local: int, store: Any) -> None:
        self.rank, self.count, self.local, self.store = dist.get_rank(), dist.get_world_size(), local, store
        self.failing, self.over = threading.Lock(), threading.Event()
        self.holder: int | None = None
        self.called = self.signalled = False
        self.watching: threading.Thread | None = None

    def device_of(self, device: torch.device) -> torch.device:
        if device.type != "cuda":
            return device
        if device.index not in (None, 0, self.local):  # 0: what the first rank chose before it made the call
            raise InputError(f"device: {device} names one GPU, but {self.count} ranks were started: use auto or cuda")
        return torch.device("cuda", self.local)

    def connect(self, device: torch.device) -> None:
        if device.type == "cuda" and self.connecting is None:  # NCCL's first sum takes a second; gloo is connected
            pool = ThreadPoolExecutor(1)
            self.connecting = pool.submit(_first_sum, device)
            pool.shutdown(wait=False)

    def _wait_for_connection(self) -> None:
        """Wait until the GPUs are connected; called first by every method that uses them.

        Collective calls must come in the same order on all ranks.
        """
        if self.connecting is not None:
            self.connecting.result()

    def finish_connecting(self) -> None:
        """Wait until a connection of GPUs that was started has succeeded or failed."""
        if self.connecting is not None:
            self.connecting.exception()

    def own_rows(self, whole: Tensor) -> Tensor:
        each = -(-len(whole) // self.count)
        start, stop = self.rank * each, (self.rank + 1) * each
        if stop <= len(whole):
            return whole[start:stop]
        return whole[torch.arange(start, stop, device=whole.device).clamp_(max=len(whole) - 1)]

    def all_gather_rows(self, part: Tensor, rows: int) -> Tensor:
        self._wait_for_connection()
        whole = part.new_empty(self.count * len(part), *part.shape[1:])
        _all_gather(whole, part.contiguous())
        return whole[:rows]

    def all_reduce(self, triangles: Sequence[Tensor], others: Sequence[Tensor], counts: Sequence[int]) -> list[int]:
        numbers = self.sum(counts)  # first: the hosts can exchange these while the GPUs still compute
        self._wait_for_connection()
        for tensor in others:
            dist.all_reduce(tensor)
        for tensor in triangles:
            for start in range(0, len(tensor), TRIANGLE_ROWS):
                panel = tensor[start : start + TRIANGLE_ROWS, start:]
                summed = panel.contiguous()
                dist.all_reduce(summed)
                if summed.data_ptr() != panel.data_ptr():
                    panel.copy_(summed)
        return [round(n) for n in numbers]

    def broadcast_async(self, tensor: Tensor, owner: int) -> Callable[[], None]:
        self._wait_for_connection()
        work: Any = dist.broadcast(tensor, src=owner, async_op=True)
        wait: Callable[[], None] = work.wait
        return wait

    def sum(self, numbers: Sequence[float]) -> list[float]:
        summed = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def broadcast(self, value: T) -> T:
        return self._broadcast_object(value, source=0)

    def all_gather_objects(self, value: T) -> list[T]:
        return [self._broadcast_object(value, source=rank) for rank in range(self.count)]

    def _broadcast_object(self, value: T, source: int) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
        return box[0]

    def broadcast_tensor(self, tensor: Tensor) -> None:
        self._wait_for_connection()
        dist.broadcast(tensor.data, src=0)

    def call(self, function: Callable[..., T], *args: Any, first_rank_only: Mapping[str, Any], **kwargs: Any) -> T:
        self.called = True
        try:
            self.broadcast((function, args, kwargs))
            result = function(*args, **kwargs, **first_rank_only, ranks=self)
        except BaseException as error:
            self.claim_end()  # no rank will be called again
            if is_loss(error):
                raise StageError(
                    "another rank ended: the launcher's output says why; the same command resumes the run"
                ) from error
            raise
        self.called = False
        return result

    def serve(self) -> None:
        """Run the functions that the first rank calls, until it dismisses the other ranks.

        Raises StageError when a rank that this one waits for has ended without a word.
        """
        try:
            while (job := self.broadcast(None)) is not None:
                function, args, kwargs = job
                function(*args, **kwargs, ranks=self)
            self._end()
        except (RuntimeError, dist.DistError) as error:
            if is_loss(error):
                raise StageError(LOST) from error
            raise

    def dismiss(self) -> None:
        """End `serve` on the other ranks; the first rank calls this. One that has died is not waited for."""
        try:
            self.broadcast(None)
            self._end()
        except (RuntimeError, dist.DistError) as error:
            if not is_loss(error):
                raise
            self.over.set()

    def claim_end(self) -> None:
        """Become the thread that reports why all ranks end; does not return where another one does.

        That one ends the process.
        """
        if self.holder != threading.get_ident():
            self.failing.acquire()
            self.holder = threading.get_ident()

    def _end(self) -> None:
        self.finish_connecting()
        self.over.set()
        if self.watching:
            self.watching.join()  # a thread that is in the store when Python ends aborts the process
        self.all(holds=True)  # the store may live in the first rank's process: it is kept until no rank reads it


def is_loss(error: BaseException) -> bool:
    """Whether an error is what a collective call raises when a rank that it waits for has ended."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _LOSS)


def _first_sum(device: torch.device) -> None:
    with torch.cuda.device(device):
        dist.all_reduce(torch.zeros(1, device=device))

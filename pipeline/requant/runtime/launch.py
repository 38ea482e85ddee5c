"""Launch of one command on all ranks of a launcher such as torchrun; they end together.

Rank 0 runs the command as a single process would. The other ranks run the functions that rank 0 calls. A failure on one
rank ends all ranks, and rank 0 reports the reason.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from requant.errors import InputError, RequantError
from requant.runtime import signals
from requant.runtime.device import HOST_THREADS
from requant.runtime.ranks import LOST, SINGLE_PROCESS, DistributedRanks, Ranks
from requant_eval.escaping import visible
from requant_eval.strict_json import parse

log = logging.getLogger(__name__)
WAIT = timedelta(days=7)  # how long ranks wait while rank 0 merges, evaluates and writes
GRACE = 1.0  # seconds in which the first rank may detect another rank's failure by itself
REPORT_WAIT = 10.0  # seconds for the first rank to report another rank's failure
LEAVE_WAIT = 3.0  # seconds for the other ranks to end before the first one does
SIGNAL_GRACE = 2.0  # seconds for the first rank's main thread to end by itself after a signal
SIGNALLED = tuple(map(signals.exit_code, signals.ENDING))
FAILED, REPORTED, LEFT = "failed", "said", "left"  # keys of the store
_current: Ranks = SINGLE_PROCESS


def current_ranks() -> Ranks:
    """The ranks that this process belongs to: a single process, except inside `join_ranks`."""
    return _current


def idle_gpus_hint(device: str, recipe: object) -> str:
    """One line that says how to start on all GPUs of this machine.

    Empty if all are in use or one was chosen.
    """
    gpus = torch.cuda.device_count()
    if _current.count > 1 or gpus < 2 or device not in ("auto", "cuda"):
        return ""
    return f"1 of {gpus} GPUs is used; for all: torchrun --standalone --nproc-per-node {gpus} -m requant run {recipe}"


@contextmanager
def join_ranks() -> Iterator[DistributedRanks]:
    """Create the process group that the environment describes.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
    Raises InputError if a machine that has GPUs has more ranks than GPUs.
    """
    global _current
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    started = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), local + 1)
    if gpus:
        if started > gpus:
            raise InputError(
                f"{started} ranks were started where there are {gpus} GPUs: start {gpus}, or hide them all with "
                "CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        torch.cuda.set_device(local)
        if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default: too few threads for the work on the CPU
            torch.set_num_threads(max(1, min(HOST_THREADS, _cores() // started)))
    store, rank, count = next(rendezvous("env://", timeout=WAIT))
    backend, group = "cpu:gloo,cuda:nccl" if gpus else "gloo", PrefixStore("group", store)
    dist.init_process_group(backend, store=group, rank=rank, world_size=count, timeout=WAIT)
    # A call that waits in a store blocks every other call on the same connection, and NCCL waits in its store.
    connection = store.clone() if hasattr(store, "clone") else store
    ranks = _current = DistributedRanks(local, PrefixStore("requant", connection))
    try:
        yield ranks
    finally:
        _current = SINGLE_PROCESS
        ranks.finish_connecting()
        dist.destroy_process_group()


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_on_all_ranks(
    command: Callable[[], None], silenced: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    """Run `command` on the first rank and serve its calls on the others.

    Each process ends with its own exit code.

    silenced: context manager in which the other ranks print nothing, since the first rank prints for all.
    """
    try:
        with join_ranks() as ranks:
            ranks.watching = threading.Thread(target=_watch, args=(ranks,), daemon=True)
            ranks.watching.start()
            signals.watch(partial(_end_on_signal, ranks))
            if ranks.first:
                _run_first(ranks, command)
            else:
                _run_other(ranks, silenced)
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(visible(f"error: {error}"), file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    if not ranks.first:
        _exit_quietly()


def _exit_quietly() -> NoReturn:
    """End the process of a rank that has served, without finalizing Python.

    Nothing is left to write. On a busy machine a library's thread that still runs while Python ends aborts the process,
    and the launcher then ends all ranks with an error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _run_first(ranks: DistributedRanks, command: Callable[[], None]) -> None:
    try:
        command()
    except BaseException as error:
        code = _message_and_code(error)[1]
        if ranks.called or code in SIGNALLED:  # after a signal the others may be ending too: nothing is awaited
            ranks.claim_end()
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            ranks.store.set(REPORTED, "")
            _store_failure(ranks, "", code)
            _exit(ranks, code)
        raise
    finally:
        ranks.dismiss()


def _run_other(ranks: DistributedRanks, silenced: Callable[[], AbstractContextManager[None]]) -> None:
    logging.getLogger("requant").addHandler(logging.NullHandler())  # the first rank logs for all
    try:
        with silenced():
            ranks.serve()
    except BaseException as error:  # noqa: BLE001 - after any error the other ranks must not wait for this one
        ranks.claim_end()
        _end_other(ranks, *_message_and_code(error))


def _end_other(ranks: DistributedRanks, message: str, code: int) -> NoReturn:
    """End another rank than the first one, for a reason that the first one reports, or else this one."""
    _store_failure(ranks, message, code)
    _wait_until_reported(ranks, message)
    _exit(ranks, code)


def _end_on_signal(ranks: DistributedRanks, number: int) -> None:
    """End this process on a signal, in a thread: a collective call keeps the main thread from seeing it.

    The main thread of the first rank gets time to do it itself.
    """
    message, code = f"{signals.word(number)}: {signals.RESUMES}", signals.exit_code(number)
    if not ranks.first:
        if ranks.failing.acquire(blocking=False):
            _end_other(ranks, message, code)
        return
    ranks.signalled = True
    time.sleep(SIGNAL_GRACE)
    if ranks.failing.acquire(blocking=False):
        print(message, file=sys.stderr, flush=True)
        ranks.store.set(REPORTED, "")
        _store_failure(ranks, "", code)
        _exit(ranks, code)


def _message_and_code(error: BaseException) -> tuple[str, int]:
    """Message and exit code of an error."""
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        number = signals.number_of(error)
        return f"{signals.word(number)}: {signals.RESUMES}", signals.exit_code(number)
    if isinstance(error, RequantError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return f"{error.filename or ''}: {error.strerror or error}", 1
    return "".join(traceback.format_exception(error)), 1


def _store_failure(ranks: DistributedRanks, message: str, code: int) -> None:
    """Record this rank's failure in the store, unless another rank's is there."""
    with suppress(dist.DistError):  # the store ended with the first rank
        ranks.store.compare_set(FAILED, "", json.dumps({"rank": ranks.rank, "text": message, "code": code}))


def _wait_until_reported(ranks: DistributedRanks, message: str) -> None:
    """Wait until the first rank has reported this failure; if it does not, report it here.

    The first rank's collective calls fail once this process has ended, which would hide the reason.
    """
    until = time.monotonic() + REPORT_WAIT
    with suppress(dist.DistError):
        while time.monotonic() < until:
            if ranks.store.check([REPORTED]):
                return
            time.sleep(0.1)
    print(visible(f"error: rank {ranks.rank}: {message}"), file=sys.stderr, flush=True)


def _watch(ranks: DistributedRanks) -> None:
    """End this process when another rank has failed.

    A collective call would wait for that rank forever.
    """
    while not ranks.over.wait(0.2):
        try:
            failed = ranks.store.check([FAILED])
        except dist.DistError:
            return _end_without_store(ranks)
        if failed:
            return _end_after(ranks, parse(ranks.store.get(FAILED)))


def _end_without_store(ranks: DistributedRanks) -> None:
    """End after the first rank, in whose process the store was.

    The main thread, which may learn of it by itself, is not contradicted.
    """
    if not ranks.over.is_set() and ranks.failing.acquire(blocking=False):
        print(f"error: rank {ranks.rank}: {LOST}", file=sys.stderr, flush=True)
        _exit(ranks, 1)


def _end_after(ranks: DistributedRanks, failure: Mapping[str, Any]) -> None:
    """End with the exit code of the rank that failed; the first rank reports the failure."""
    if failure["rank"] == ranks.rank:
        return
    time.sleep(GRACE)
    if ranks.first:
        if ranks.signalled:
            return  # this rank was told to end as well, and says so
        if not ranks.failing.acquire(blocking=False):
            return  # the main thread is failing too, and reports the reason
        if failure["text"]:
            log.error("stopped: rank %d: %s", failure["rank"], failure["text"])
            print(visible(f"error: rank {failure['rank']}: {failure['text']}"), file=sys.stderr, flush=True)
        ranks.store.set(REPORTED, "")
    _exit(ranks, failure["code"])


def _exit(ranks: DistributedRanks, code: int) -> NoReturn:
    """End the process at once, from any thread.

    A collective call that waits for other ranks cannot be interrupted.

    Open files are left as a kill would leave them. The first rank ends last, since the store may be in its process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    until = time.monotonic() + LEAVE_WAIT
    with suppress(dist.DistError):
        left = ranks.store.add(LEFT, 0 if ranks.first else 1)
        while ranks.first and left < ranks.count - 1 and time.monotonic() < until:
            time.sleep(0.05)
            left = ranks.store.add(LEFT, 0)
    os._exit(code)
